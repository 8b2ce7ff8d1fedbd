"""Two views of an image: their crops, and the parameters of their colour changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.recipe.pretrain import ViewsSection
from dupr_cli.views.augmentation import FLIP, Photometric, draw_parameters
from dupr_cli.views.geometry import Crop, as_crop, random_crop_pair


@dataclass(frozen=True)
class ViewPairBatch:
    """Two cropped views of each image, on the CPU, not yet flipped or recoloured.

    views: (N, 2, 3, S, S) uint8, or (N, 2, C, S, S) float32 in 0..1 of images that keep their
    channels. crops: (N, 2, 4) float32, x0, y0, x1, y1 in source pixels.
    parameters: (N, 2, P) float32, see `augmentation`. numbers: (N,) int64, of the samples
    in the shards. unreadable: images that could not be decoded and were replaced.
    """

    views: Tensor
    crops: Tensor
    parameters: Tensor
    numbers: Tensor
    unreadable: int = 0

    @property
    def flips(self) -> Tensor:
        """(N, 2) bool: view mirrored left to right after cropping."""
        return self.parameters[..., FLIP].bool()

    def pin_memory(self) -> ViewPairBatch:
        """The loader calls this for a CUDA device."""
        return replace(self, views=self.views.pin_memory())

    @staticmethod
    def stack(pairs: Sequence[ViewPairBatch]) -> ViewPairBatch:
        """Stack the results of `cut_pair` into a batch."""
        return ViewPairBatch(
            torch.stack([pair.views for pair in pairs]),
            torch.stack([pair.crops for pair in pairs]),
            torch.stack([pair.parameters for pair in pairs]),
            torch.stack([pair.numbers for pair in pairs]),
            sum(pair.unreadable for pair in pairs),
        )


def crop_and_resize(pixels: Tensor, crop: Crop, size: int) -> Tensor:
    """Resize one crop to (C, size, size), antialiased, without shifting the source's pixels.

    pixels: (C, H, W). crop: x0, y0, x1, y1 in pixels of the image.
    """
    x0, y0, x1, y1 = crop
    part = pixels[None, :, y0:y1, x0:x1]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def cut_pair(
    pixels: Tensor,
    views: ViewsSection,
    colours: Photometric,
    random: np.random.Generator,
    number: int = 0,
    unreadable: int = 0,
    flip_together: bool = False,
) -> ViewPairBatch:
    """The two views of one image, without the batch axis; `random` supplies all randomness.

    pixels: (3, H, W) uint8 in RGB, or (C, H, W) float32 in 0..1 of an image with own channels.
    flip_together: mirror both views or neither.
    Source: docs/method.md, "Views".
    """
    own_channels, height, width = pixels.shape
    crops = random_crop_pair(width, height, views, random)
    channels = None if pixels.dtype == torch.uint8 else own_channels
    parameters = np.stack([draw_parameters(colours, random, channels) for _ in range(2)])
    if flip_together:
        parameters[1, FLIP] = parameters[0, FLIP]
    return ViewPairBatch(
        torch.stack([crop_and_resize(pixels, as_crop(crop), views.size) for crop in crops]),
        torch.from_numpy(crops),
        torch.from_numpy(parameters),
        torch.tensor(number),
        unreadable,
    )
