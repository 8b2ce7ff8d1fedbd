"""Decodes images to tensors, for loaders whose speed matters.

The pixels are those of `channels.decode_as`. Pillow reads the header, and torchvision decodes the
usual JPEGs, because Pillow spends a third of its time on copies to and from its own layout.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, ChannelImage, PixelFormat
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.pixels import open_picture


def as_tensor(image: AnyImage) -> Tensor:
    """(C, H, W): uint8 in RGB, or float32 in 0..1 of an image that keeps its channels."""
    values = image.values if isinstance(image, ChannelImage) else np.array(image)
    return torch.from_numpy(values).permute(2, 0, 1)


def decode_tensor(data: bytes, pixels: PixelFormat | None) -> Tensor:
    """The upright image (C, H, W) in this format, None for RGB; see `as_tensor`.

    Raises one of IMAGE_ERRORS.
    """
    if pixels is not None:
        return as_tensor(decode_as(io.BytesIO(data), pixels))
    # Its import takes longer than all else in a dry run, which decodes nothing.
    from torchvision.io import ImageReadMode, decode_jpeg

    picture = open_picture(io.BytesIO(data))
    image = picture.image
    if image.format == "JPEG" and image.mode in ("RGB", "L") and picture.orientation == 1:
        try:
            coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            decoded: Tensor = decode_jpeg(coded, ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # Pillow decides whether the file is damaged, as it does for every other stage.
    return as_tensor(picture.rgb())
