"""The frozen backbone: it maps images to features of its levels; nothing in it is trained.

Input statistics are those of the weights. A random network's batch norms have not seen any images:
their statistics are measured on training images first, or it would be a straw man.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dupr_cli.artifacts.weights import load_backbone
from dupr_cli.models.batch_norm import measured_statistics
from dupr_cli.models.compared import ComparedWeights
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.probe.data import LIMIT_TRAIN, ImageSet
from dupr_cli.probe.loading import CentreCrops
from dupr_cli.progress import Reporter
from dupr_cli.recipe import Level, ProbeRecipe
from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD
from dupr_cli.recipe.probe import ProbeImageSection
from dupr_cli.runtime.loader import in_batches, load


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone in eval mode on its device, with the normalisation of its input.

    mean, std: (1, 3, 1, 1), of pixels in [0, 1]. precision: of the convolutions.
    """

    network: ResNetBackbone
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: torch.dtype

    def maps(self, images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """Images (N, 3, H, W) to maps (N, C, H / stride, W / stride) float32 of each level.

        images: uint8, or float32 in [0, 1].

        They are inference tensors, so autograd accepts only copies of them.
        """
        with torch.inference_mode(), self._autocast():
            features = self.network(self._normalised(images), levels, last=max(levels))
            return {level: features[level].float() for level in levels}

    def pooled(self, images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """(N, 3, H, W) uint8 to (N, C) float32 of each level: the mean over its cells."""
        return {v: features.mean((2, 3)) for v, features in self.maps(images, levels).items()}

    def measure_batch_norm(self, batches: Iterable[Tensor]) -> None:
        """Replace the running statistics by the mean over batches of images, as `maps` takes."""
        with measured_statistics(self.network), self._autocast():
            for images in batches:
                self.network(self._normalised(images))

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)


def freeze_backbone(
    compared: ComparedWeights, recipe: ProbeRecipe, device: torch.device
) -> FrozenBackbone:
    """The backbone with the given weights; a random one follows from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    network = ResNetBackbone(compared.architecture)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    if compared.weights is not None:
        load_backbone(network, compared.weights)
        mean, std = compared.weights.metadata.input_mean, compared.weights.metadata.input_std
    network.requires_grad_(False).eval()
    network.to(device).to(memory_format=torch.channels_last)
    return FrozenBackbone(
        network,
        torch.tensor(mean, device=device).view(1, 3, 1, 1),
        torch.tensor(std, device=device).view(1, 3, 1, 1),
        device,
        precision(recipe.images, device),
    )


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
    features = {v: torch.empty(len(images), frozen.network.channels[v]) for v in levels}
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
