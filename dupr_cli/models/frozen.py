"""The frozen backbone: it maps images to features of its levels; nothing in it is trained.

Input statistics are those of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dupr_cli.models.backbone import Backbone, as_backbone, load_backbone, make_backbone
from dupr_cli.models.batch_norm import measured_statistics
from dupr_cli.models.compared import ComparedWeights
from dupr_cli.models.dilation import dilate
from dupr_cli.recipe.base import Level


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone in eval mode on its device, with the normalisation of its input.

    network: a `Backbone`. mean, std: (1, C, 1, 1), of pixels in [0, 1]. precision: of the
    convolutions.
    """

    network: nn.Module
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: torch.dtype

    @property
    def shape(self) -> Backbone:
        """The network's levels, channels and strides."""
        return as_backbone(self.network)

    def maps(self, images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """Images (N, C, H, W) to maps (N, C, H / stride, W / stride) float32 of each level.

        images: uint8, or float32 in [0, 1].

        They are inference tensors, so autograd accepts only copies of them.
        """
        return self.maps_of_normalised(self._normalised(images), levels)

    def maps_of_normalised(self, images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """`maps` of images that are already normalised, such as those of `normalised_batch`."""
        with torch.inference_mode(), self._autocast():
            features = self.network(images, levels, last=max(levels))
            return {level: features[level].float() for level in levels}

    def pooled(self, images: Tensor, levels: Sequence[Level]) -> dict[Level, Tensor]:
        """Images, as `maps` takes, to (N, C) float32 of each level: the mean over its cells."""
        return {v: features.mean((2, 3)) for v, features in self.maps(images, levels).items()}

    def measure_batch_norm(self, batches: Iterable[Tensor]) -> None:
        """Replace the running statistics by the mean over batches of images, as `maps` takes."""
        self.measure_on_normalised(self._normalised(images) for images in batches)

    def measure_on_normalised(self, batches: Iterable[Tensor]) -> None:
        """`measure_batch_norm` on images that are already normalised."""
        with measured_statistics(self.network), self._autocast():
            for images in batches:
                self.network(images)

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)


def normalised_batch(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int, least: int = 0
) -> Tensor:
    """Images (N, C, H, W) float32 on the device of mean, padded at the right and bottom to one
    size, a multiple of `multiple`, so that a level's cells are exactly a stride apart.

    least: the size is at least this.

    images: (C, h, w) each, uint8 or float32 in [0, 1]. mean, std: (C, 1, 1), of pixels in [0, 1].
    """
    height, width = (
        -(-max(least, *(image.shape[side] for image in images)) // multiple) * multiple
        for side in (1, 2)
    )
    pixels = torch.zeros(len(images), len(mean), height, width, device=mean.device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    for padded, image in zip(pixels, images, strict=True):
        moved = image.to(mean.device, non_blocking=True)
        if moved.dtype == torch.uint8:
            moved = moved.float().div_(255)
        padded[:, : image.shape[1], : image.shape[2]] = (moved - mean) / std
    return pixels


def freeze(
    compared: ComparedWeights,
    seed: int,
    device: torch.device,
    precision: torch.dtype,
    dilated: bool = False,
) -> FrozenBackbone:
    """The backbone with the given weights; a random one follows from the seed. dilated: if it can
    be, see `dilate`."""
    torch.manual_seed(seed)
    taken = compared.input
    network = make_backbone(compared.architecture, taken.channels)
    if compared.weights is not None:
        load_backbone(network, compared.weights)
    if dilated:
        dilate(network)
    network.requires_grad_(False).eval()
    network.to(device).to(memory_format=torch.channels_last)
    return FrozenBackbone(
        network,
        torch.tensor(taken.mean, device=device).view(1, -1, 1, 1),
        torch.tensor(taken.std, device=device).view(1, -1, 1, 1),
        device,
        precision,
    )
