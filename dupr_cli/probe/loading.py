"""Prepare images for the frozen backbone: square crops, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, ChannelImage
from dupr_cli.probe.data import ImageSet
from dupr_cli.views.geometry import Crop


def pixels(image: AnyImage) -> Tensor:
    """(3, H, W) uint8, or (C, H, W) float32 in 0..1 of own channels."""
    # torch rejects Pillow's read-only memory, so this is a copy.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def centre_crop(image: AnyImage, resize: int, crop: int) -> AnyImage:
    """The middle crop x crop of the image, resized so that its short side is `resize`.

    Source: the usual test crop of ImageNet, as torchvision's Resize and CenterCrop make it.
    """
    short = min(image.size)
    width, height = (max(resize, int(resize * side / short)) for side in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + crop, top + crop))


def cut_view(image: AnyImage, crop: Crop, size: int, flip: bool) -> AnyImage:
    """One crop resized to size x size, antialiased, then mirrored left to right if `flip` is set.

    crop: x0, y0, x1, y1 in pixels of the image.
    """
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=crop)
    if not flip:
        return view
    if isinstance(view, ChannelImage):
        return view.mirrored()
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class CentreCrops:
    """Reads the test crop of an image of the set, see `pixels`."""

    images: ImageSet
    resize: int
    crop: int

    def __call__(self, position: int) -> Tensor:
        return pixels(centre_crop(self.images.image(position), self.resize, self.crop))
