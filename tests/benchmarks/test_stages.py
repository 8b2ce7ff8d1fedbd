"""Rates of the stages on this machine, each beside the plain form.

make bench prints them; docs/benchmarks.md says what was seen, on what.
"""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from dupr_cli import prepare
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.pretrain.data import training_batches
from dupr_cli.recipe import PrepareRecipe, PretrainRecipe, load_recipe
from dupr_cli.runtime.parallel import World
from dupr_cli.views.augmentation import augment
from tests.support.images import noise_image


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        noise_image(number, 500, 375).save(folder / f"{number:04d}.jpg", quality=92)
    return folder


def test_view_pairs_per_second_of_one_loader_process() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prepare.run(load_recipe(PrepareRecipe, "default"), photographs(root / "i", 400), root / "s")
        recipe = load_recipe(
            PretrainRecipe,
            "dupr-r50-in1k-200ep",
            ["data.batch_size=32", "data.workers=0", "method.queue_length=4096"],
        )
        alone = World(torch.device("cpu"))
        loader, _ = training_batches(open_shards(str(root / "s")), recipe, 0, alone)
        batches = list(islice(loader, 1))
        start = time.perf_counter()
        batches = list(islice(loader, 6))
        loaded = 6 * 32 / (time.perf_counter() - start)
        torch.set_num_threads(1)
        start = time.perf_counter()
        for batch in batches:
            for view in range(2):
                augment(batch.views[:, view], batch.parameters[:, view], recipe.method.augmentation)
        augmented = 6 * 32 / (time.perf_counter() - start)
        print(f"\ndecode and two crops {loaded:.0f} pairs/s; augmentation {augmented:.0f} pairs/s")
        assert loaded > 0
