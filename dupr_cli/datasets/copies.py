"""Finds copies of an image among the images of another set: by its bytes, or by how it looks.

Both `dupr evaluate --leaks` and `dupr prepare --exclude` use it, so that they agree on what a copy
is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dupr_cli.artifacts.hashes import count_bits, perceptual_hash
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.datasets.channels import open_channels
from dupr_cli.datasets.pixels import IMAGE_ERRORS, open_picture

# Of 64 bits, this many may differ: copies of a photograph in other sizes and qualities stay within.
DISTANCE = 6


@dataclass(frozen=True)
class ImageHashes:
    """The hashes of one image. sha256: of its bytes. perceptual: None if it does not decode."""

    sha256: bytes
    perceptual: int | None


@dataclass(frozen=True)
class Copy:
    """The image of a set that another image is a copy of. bits: hash bits that differ."""

    number: int
    same_bytes: bool
    bits: int


def hash_image(data: bytes, pixels: PixelFormat | None = None) -> ImageHashes:
    """The hashes of an image, given the bytes of its file.

    pixels: of images that keep their channels; they look as `ChannelImage.shown` shows them.
    """
    digest = hashlib.sha256(data).digest()
    try:
        if pixels is not None:
            image = open_channels(io.BytesIO(data)).image(pixels)
            return ImageHashes(digest, perceptual_hash(image.shown()))
        picture = open_picture(io.BytesIO(data))
        scale = max(1.0, min(picture.upright) / 128)  # lets a JPEG decode at an eighth
        small = (round(picture.upright[0] / scale), round(picture.upright[1] / scale))
        return ImageHashes(digest, perceptual_hash(picture.rgb(small, Image.Resampling.BOX)))
    except IMAGE_ERRORS:
        return ImageHashes(digest, None)


class HashedImages:
    """The hashes of all images of a set, to look up copies of them."""

    def __init__(self, images: Sequence[ImageHashes]) -> None:
        self._by_bytes = {known.sha256: number for number, known in enumerate(images)}
        self._looks = np.array([known.perceptual or 0 for known in images], dtype=np.uint64)
        self._usable = np.array([known.perceptual is not None for known in images], dtype=bool)

    def find(self, image: ImageHashes) -> Copy | None:
        """The image of the set with the same bytes, or else the one that looks most like `image` if
        it is within DISTANCE."""
        if image.sha256 in self._by_bytes:
            return Copy(self._by_bytes[image.sha256], True, 0)
        if image.perceptual is None or not self._usable.any():
            return None
        differing = count_bits(self._looks ^ np.uint64(image.perceptual))
        bits = np.where(self._usable, differing, 64)
        nearest = int(bits.argmin())
        if bits[nearest] > DISTANCE:
            return None
        return Copy(nearest, False, int(bits[nearest]))
