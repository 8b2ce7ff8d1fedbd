"""Features of the frozen backbone, for probes.

A random network's batch norms have not seen any images: their statistics are measured on training
images first, or it would be a straw man.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dupr_cli.models.compared import ComparedWeights
from dupr_cli.models.frozen import FrozenBackbone, freeze
from dupr_cli.probe.data import LIMIT_TRAIN, ImageSet
from dupr_cli.probe.loading import CentreCrops
from dupr_cli.progress import Reporter
from dupr_cli.recipe import Level, ProbeRecipe
from dupr_cli.recipe.probe import ProbeImageSection
from dupr_cli.runtime.loader import in_batches, load


def freeze_backbone(
    compared: ComparedWeights, recipe: ProbeRecipe, device: torch.device
) -> FrozenBackbone:
    """The backbone with the given weights; a random one follows from the recipe's seed."""
    return freeze(compared, recipe.seed, device, precision(recipe.images, device))


def precision(images: ProbeImageSection, device: torch.device) -> torch.dtype:
    """The dtype that images.precision means on this device."""
    if images.precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[images.precision]


def measure_random(
    frozen: FrozenBackbone,
    compared: ComparedWeights,
    train: ImageSet,
    recipe: ProbeRecipe,
    reporter: Reporter,
) -> None:
    """Measure batch-norm statistics on training images, for random weights only."""
    if compared.weights is not None:
        return
    images, used = recipe.images, train.drawn(recipe.images.bn_images, recipe.seed, LIMIT_TRAIN)
    reporter.info(
        f"{compared.address}: batch-norm statistics are measured on {len(used)} training images; "
        f"random weights have none of their own."
    )
    # A last batch of one image would count as much as a full batch, and has no spread at res5.
    requests = [batch for batch in in_batches(len(used), images.batch_size) if len(batch) > 1]
    read = CentreCrops(used, images.resize, images.crop)
    batches = load(read, torch.stack, requests, images.workers, frozen.device)
    frozen.measure_batch_norm(batches)


def extract(
    frozen: FrozenBackbone, images: ImageSet, recipe: ProbeRecipe, name: str, reporter: Reporter
) -> dict[Level, Tensor]:
    """Pooled features of the centre crop of every image, (N, C) float32 on the CPU, by level.

    name: the label of the progress bar.
    """
    section, levels = recipe.images, recipe.levels
    read = CentreCrops(images, section.resize, section.crop)
    requests = in_batches(len(images), section.batch_size)
    features = {v: torch.empty(len(images), frozen.shape.channels[v]) for v in levels}
    first = 0
    with reporter.task(f"features {name}", len(images), "images") as task:
        for batch in load(read, torch.stack, requests, section.workers, frozen.device):
            for level, values in frozen.pooled(batch, levels).items():
                features[level][first : first + len(values)] = values.cpu()
            first += len(batch)
            task.advance(len(batch))
    return features


class Stopwatch:
    """Seconds of each part of a measurement."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now
