"""A step beside its bare backbone, and training beside the same written with lightly's parts.

All sides run in turn. make bench prints the rates; docs/benchmarks.md says what was seen, on what.
lightly is no dependency: `pip install lightly==1.6.0`, whose NTXentLoss takes `memory_bank_size`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from dupr_cli import prepare
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.measure.costs import measure_step
from dupr_cli.pretrain.data import training_batches
from dupr_cli.pretrain.step import Training
from dupr_cli.recipe import PretrainRecipe, load_recipe
from dupr_cli.runtime.parallel import World
from tests.support.images import noise_image

CPU = torch.device("cpu")
BATCH, QUEUE, SIDE = 64, 4096, 64
ROUNDS, STEPS = 5, 8
SMALL = ["method.queue_length=4096", "data.holdout=0", "data.workers=2"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardSet]:
    """A folder of JPEGs of 128 x 96 pixels, and its shards."""
    root = tmp_path_factory.mktemp("photographs")
    folder = root / "images" / "all"
    folder.mkdir(parents=True)
    for number in range(1024):
        noise_image(number, 128, 96).save(folder / f"{number:04d}.jpg", quality=92)
    prepare.run("default", folder, root / "shards")
    return folder.parent, open_shards(str(root / "shards"))


@pytest.mark.parametrize("side", [64, 128])
def test_a_step_beside_its_bare_backbone(photographs: tuple[Path, ShardSet], side: int) -> None:
    bins = f"method.patch.bins={{res4: {side // 16}, res5: {side // 32}}}"
    options = ["method.queue_length=65536", f"method.views.size={side}", bins, *SMALL[1:]]
    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", options)
    cost = measure_step(photographs[1], recipe, CPU, 30.0)
    print(
        f"\nviews of {side}, batch {cost.images}, queues of 65,536: {1000 * cost.seconds:.0f} ms, "
        f"the bare backbone {1000 * cost.bare:.0f} ms, {cost.seconds / cost.bare:.2f} times"
    )
    assert cost.seconds > cost.bare


def test_training_beside_lightly(photographs: tuple[Path, ShardSet]) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    folder, shards = photographs
    sides: dict[str, Iterator[object]] = {
        "dupr": _dupr(shards, "dupr-r18-cpu-smoke", []),
        "dupr, DenseCL": _dupr(
            shards, "dupr-r18-cpu-smoke",
            ["method.name=densecl", "method.image.weights={res5: 0.5}",
             "method.patch.weights={res5: 0.5}", "method.views.min_overlap=0"],
        ),
        **{f"lightly, {workers} workers": _lightly(folder, workers) for workers in (0, 1, 2)},
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for steps in sides.values():
        next(steps)  # starts its loader
    for _ in range(ROUNDS):
        for name, steps in sides.items():
            start = time.perf_counter()
            for _ in islice(steps, STEPS):
                pass
            rates[name].append(BATCH * STEPS / (time.perf_counter() - start))
    for name, found in rates.items():
        print(f"\n{name}: {median(found):.1f} images/s", end="")
        print(f" ({min(found):.1f} to {max(found):.1f})", end="")
    assert all(found for found in rates.values())


def _dupr(shards: ShardSet, name: str, options: list[str]) -> Iterator[object]:
    recipe = load_recipe(PretrainRecipe, name, [*SMALL, *options])
    world = World(CPU)
    training = Training(recipe, 10_000, world)
    loader, _ = training_batches(shards, recipe, 0, world)
    for number, batch in enumerate(loader):
        yield training.step(number, batch)


class _Files(Dataset[list[torch.Tensor]]):
    def __init__(self, folder: Path, transform: Callable[[Image.Image], list[torch.Tensor]]):
        self._files, self._transform = sorted(folder.rglob("*.jpg")), transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        with Image.open(self._files[number]) as image:
            return self._transform(image.convert("RGB"))


def _lightly(folder: Path, workers: int) -> Iterator[object]:
    """DenseCL with plain batch norm, from lightly's modules, losses and transform."""
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import DenseCLProjectionHead
    from lightly.transforms import DenseCLTransform

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet18().children())[:-2])
            self.whole = DenseCLProjectionHead(512, 512, 128)
            self.dense = DenseCLProjectionHead(512, 512, 128)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            maps = self.backbone(x).flatten(2).transpose(1, 2)
            local = self.dense(maps)
            return maps, self.whole(maps.mean(1)), local

    query = Branch().to(memory_format=torch.channels_last)
    key = copy.deepcopy(query)
    utils.deactivate_requires_grad(key)
    losses = [NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128)) for _ in range(2)]
    optimizer = torch.optim.SGD(query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    data = _Files(folder, DenseCLTransform(input_size=SIDE))
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=workers,
                        persistent_workers=workers > 0)  # fmt: skip
    for first, second in cycle(loader):
        utils.update_momentum(query, key, 0.99)
        maps, whole, local = query(first.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            k_maps, k_whole, k_local = key(second.contiguous(memory_format=torch.channels_last))
        matched = utils.select_most_similar(maps, k_maps, k_local)
        loss = losses[0](whole, k_whole) + losses[1](local.flatten(0, 1), matched.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss
