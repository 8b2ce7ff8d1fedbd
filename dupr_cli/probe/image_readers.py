"""Sources of the probed images' pixels: files, shards, labelled sets, and objects cut out of them.

Everything is decoded upright, one image at a time.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dupr_cli.artifacts.pixel_formats import AnyImage, PixelFormat
from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.errors import RunError


class ImageReader(Protocol):
    """A source of images, by number."""

    def image(self, number: int) -> AnyImage:
        """Upright image. Raises RunError naming it if it cannot be decoded."""
        ...

    def size(self, number: int) -> int:
        """Bytes of the image's file."""
        ...


@dataclass(frozen=True)
class Files:
    """Image files of a folder. pixels: their format, None for RGB."""

    paths: tuple[Path, ...]
    pixels: PixelFormat | None = None

    def image(self, number: int) -> AnyImage:
        return _decode(self.paths[number], self.pixels, str(self.paths[number]))

    def size(self, number: int) -> int:
        return self.paths[number].stat().st_size


@dataclass(frozen=True)
class Samples:
    """Samples of shards. pixels: their format, None for RGB."""

    shards: ShardSet
    pixels: PixelFormat | None = None

    def image(self, number: int) -> AnyImage:
        sample = self.shards[number]
        shard, _ = self.shards.place(number)
        place = f"{self.shards.shards[shard]}: {sample.key}"
        return _decode(io.BytesIO(sample.image), self.pixels, place)

    def size(self, number: int) -> int:
        shard, position = self.shards.place(number)
        return self.shards.index(shard).images[position][1]


@dataclass(frozen=True)
class Whole:
    """Whole images of a labelled set."""

    images: LabelledSet

    def image(self, number: int) -> AnyImage:
        return self.images.image(number)

    def size(self, number: int) -> int:
        return self.images.sizes[number]


@dataclass(frozen=True)
class ObjectCrops:
    """Objects of a labelled set. places: for each, its image and its number in the image."""

    images: LabelledSet
    places: tuple[tuple[int, int], ...]

    def image(self, number: int) -> AnyImage:
        position, box = self.places[number]
        image = self.images.image(position)
        corners = self.images.annotations[position].boxes[box].tolist()
        return image.crop(square_around(corners, image.width, image.height))

    def size(self, number: int) -> int:
        return self.images.sizes[self.places[number][0]]


def square_around(corners: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the square on a box's longer side, moved and, if necessary, cut to fit.

    corners: of the box, inside an image of width x height pixels.
    """
    x0, y0, x1, y1 = corners
    side = max(1, round(max(x1 - x0, y1 - y0)))
    left = max(0, min(round((x0 + x1 - side) / 2), width - side))
    top = max(0, min(round((y0 + y1 - side) / 2), height - side))
    return left, top, min(width, left + side), min(height, top + side)


def _decode(file: Path | io.BytesIO, pixels: PixelFormat | None, place: str) -> AnyImage:
    try:
        return decode_as(file, pixels)
    except IMAGE_ERRORS as error:
        raise RunError(
            f"{place}: the image cannot be decoded ({error}). Replace it, or remove it from the "
            f"set."
        ) from error
