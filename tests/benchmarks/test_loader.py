"""The loader beside lightly's MoCoV2Transform, on the same photographs, and the time of its steps.

    make bench, or with lightly (`pip install lightly`):
    pytest -s tests/benchmarks/test_loader.py --override-ini addopts= \
        --override-ini norecursedirs=.git

Both read JPEGs and make two views of 224 pixels of each, in one process with one thread, in turn.
CPU time is measured, so that other work on the machine counts as little as it can.
docs/benchmarks.md says what was seen.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.tensors import decode_tensor
from dupr_cli.pretrain.data import ViewPairs
from dupr_cli.recipe import PrepareRecipe, load_recipe
from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.views.augmentation import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    SATURATION,
    augment,
    draw_parameters,
)
from dupr_cli.views.geometry import as_crop, random_crop_pair
from dupr_cli.views.pairs import ViewPairBatch, crop_and_resize
from tests.support.images import SHARED_DATA, noise_image

ROUNDS = 7
BATCH = 30
METHOD = MethodSection()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    real = sorted((SHARED_DATA / "photos_500px").glob("*.JPEG"))
    if real:
        return real
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(120):
        noise_image(number, 500, 375).save(folder / f"{number:04d}.jpg", quality=92)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def shards(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("shards")
    listed = out / "photographs.txt"
    listed.write_text("\n".join(map(str, photographs)))
    prepare.run(load_recipe(PrepareRecipe, "default"), listed, out / "shards")
    return open_shards(str(out / "shards"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def loaded(shards: ShardSet, epoch: int, changed: bool) -> None:
    """All images as batches of two views, on the CPU; `changed` if also recoloured there."""
    pairs = ViewPairs(shards, METHOD, seed=0)
    for start in range(0, len(shards), BATCH):
        numbers = range(start, min(len(shards), start + BATCH))
        batch = ViewPairBatch.stack([pairs((epoch, number)) for number in numbers])
        for view in range(2 * changed):
            augment(batch.views[:, view], batch.parameters[:, view], METHOD.augmentation)


def test_beside_lightly(photographs: list[Path], shards: ShardSet) -> None:
    transforms = pytest.importorskip("lightly.transforms", reason="lightly is not installed")
    transform = transforms.MoCoV2Transform(input_size=224)

    def lightly() -> None:
        for start in range(0, len(photographs), BATCH):
            paths = photographs[start : start + BATCH]
            views = [transform(Image.open(path).convert("RGB")) for path in paths]
            for view in zip(*views, strict=True):
                torch.stack(view)

    count = len(photographs)
    assert len(shards) == count
    rounds = []
    for epoch in range(ROUNDS + 1):
        on_cpu, on_device = (partial(loaded, shards, epoch, changed) for changed in (True, False))
        rounds.append([seconds(side) for side in (lightly, on_cpu, on_device)])
    rounds = rounds[1:]  # the first fills caches
    names = "lightly", "dupr, all on the CPU", "dupr, colours left to the device"
    print(f"\n{count} photographs, {ROUNDS} rounds, one thread, CPU time; medians")
    for side, name in enumerate(names):
        rate = statistics.median(count / times[side] for times in rounds)
        ratios = sorted(times[0] / times[side] for times in rounds)
        print(
            f"  {name:<34} {rate:6.1f} images/s, {statistics.median(ratios):.2f} of lightly's "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def test_time_of_each_step(shards: ShardSet) -> None:
    random = np.random.default_rng(0)
    views = METHOD.views
    samples = [shards[number] for number in range(len(shards))]
    images = [decode_tensor(sample.image, None) for sample in samples]
    crops = [random_crop_pair(im.shape[2], im.shape[1], views, random) for im in images]
    pairs = ViewPairs(shards, METHOD, seed=0)
    batch = ViewPairBatch.stack([pairs((0, number)) for number in range(len(shards))])

    def resized() -> None:
        for image, pair in zip(images, crops, strict=True):
            for crop in pair:
                crop_and_resize(image, as_crop(crop), views.size)

    def changed(rows: torch.Tensor) -> Callable[[], None]:
        def work() -> None:
            for start in range(0, len(rows), BATCH):
                part = slice(start, start + BATCH)
                for view in range(2):
                    augment(batch.views[part, view], rows[part], METHOD.augmentation)

        return work

    def rows(**columns: float) -> torch.Tensor:
        """Parameters that change nothing but these columns."""
        table = torch.zeros_like(batch.parameters[:, 0])
        table[:, ORDER] = -1
        table[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
        for name, value in columns.items():
            table[:, {"order": ORDER, "grey": GRAYSCALE, "blur": BLUR, "flip": FLIP}[name]] = value
        table[:, HUE] = 0.05
        return table

    steps: dict[str, Callable[[], object]] = {
        "read": lambda: [shards[number] for number in range(len(shards))],
        "decode, by Pillow": lambda: [decode_as(io.BytesIO(s.image), None) for s in samples],
        "decode": lambda: [decode_tensor(sample.image, None) for sample in samples],
        "draw crops and parameters": lambda: [
            (
                random_crop_pair(im.shape[2], im.shape[1], views, random),
                draw_parameters(METHOD.augmentation, random),
                draw_parameters(METHOD.augmentation, random),
            )
            for im in images
        ],
        "cut and resize": resized,
        "to floats, normalise": changed(rows()),
        "the same and colour jitter": changed(rows(order=0)),
        "the same and grayscale": changed(rows(grey=1)),
        "the same and blur": changed(rows(blur=1.0)),
        "the same and flip": changed(rows(flip=1)),
    }
    print(f"\nms for each image (two views), {len(shards)} photographs, median of {ROUNDS} rounds")
    for name, work in steps.items():
        work()
        times = [1e3 * seconds(work) / len(shards) for _ in range(ROUNDS)]
        print(f"  {name:<28} {statistics.median(times):6.3f}")
