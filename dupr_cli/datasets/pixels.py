"""Decodes an image file to upright RGB pixels of 8 bits, the same way for every stage.

    picture = open_picture(file)       # reads the header: size, orientation; decodes nothing
    picture.rgb()                      # upright RGB image

Orientation, size and pixels belong together: Pillow turns a TIFF while decoding it, a PNG may carry
its tag after its pixels, and a tag in damaged EXIF is ignored. Therefore an image is opened once,
here, and all other code uses the `Picture`.
Source: `PIL.ImageOps.exif_transpose`, which defines upright (EXIF 2.3, tag Orientation, and XMP's
tiff:Orientation).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dupr_cli.errors import StoppedRunError

# Errors from opening and decoding a damaged image, except for bugs in some of Pillow's plugins.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF
# A file whose values stay below this share of its depth may hold, for example, 12 bits in 16.
_LEAST_SHARE = 1 / 4


class UnknownRangeError(ValueError):
    """It is unknown which values of an image are black and white."""


@dataclass(frozen=True)
class Picture:
    """An image whose pixels need not be decoded yet.

    stored: width and height in pixels as the file holds them. deep: whether the file says that its
    values have 16 bits.
    """

    image: Image.Image
    stored: tuple[int, int]
    deep: bool

    @cached_property
    def orientation(self) -> int:
        """1 to 8. A PNG may have to be decoded to find its tag; raises the same errors as `rgb`."""
        if self.image.format == "PNG" and "exif" not in self.image.info:
            self.image.load()
        return _tag(self.image)

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def is_wide(self) -> bool:
        """Whether values may have more than 8 bits, so that only decoding shows their range."""
        return self.deep or self.image.mode[0] in "IF"

    def rgb(
        self,
        size: tuple[int, int] | None = None,
        resample: Image.Resampling = Image.Resampling.LANCZOS,
        limits: tuple[float, float] | None = None,
    ) -> Image.Image:
        """The upright image in RGB; transparent parts become white.

        size: width and height of the upright result, pixels. limits: values of black and white of
        an image with more than 8 bits; by default those of its depth, if it is known.
        Raises UnknownRangeError if it is not; OSError, ValueError or SyntaxError if the image is
        damaged.
        """
        image, box = self.image, None
        size = size or self.upright
        if size != self.upright:
            # libjpeg shrinks by a power of two while decoding; the filter shrinks the rest, from at
            # least twice the size.
            wide, high = size[::-1] if self.orientation >= 5 else size
            drafted = image.draft("RGB", (2 * wide, 2 * high))
            box = drafted[1] if drafted else None
        image.load()
        # Pillow has turned a TIFF by now.
        turn = _tag(image) if image.format == "TIFF" else self.orientation
        rgb = self._converted(image, limits)
        if turn >= 5:
            size = size[::-1]
        if size != rgb.size or box is not None:
            rgb = rgb.resize(size, resample, box)
        if turn != 1:
            rgb = rgb.transpose(_TURN[turn])
        if rgb is image:
            rgb = image.copy()
        rgb.info = {}  # drops stale EXIF, and the profile of another colour space
        return rgb

    def _converted(self, image: Image.Image, limits: tuple[float, float] | None) -> Image.Image:
        if image.mode[0] in "IF":
            return _grey(image, self.deep, limits).convert("RGB")
        if "A" in image.getbands() or "transparency" in image.info:
            rgba = image.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        if self.deep:  # Pillow keeps the upper 8 bits of colour
            highest = int(np.asarray(rgb).max())
            if highest < 255 * _LEAST_SHARE and limits != (0, 65535):
                raise UnknownRangeError(
                    f"black and white are not known: the upper 8 of 16 bits of its colours do not "
                    f"exceed {highest} of 255; convert it to 8 bits, or take it unchanged with "
                    f"`dupr prepare --set image.range=[0, 65535]`"
                )
        return rgb


def _grey(image: Image.Image, deep: bool, limits: tuple[float, float] | None) -> Image.Image:
    """Integers or floats as 8 bits: black and white are `limits`, or those of a depth that fits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if limits is None:
        depths = (65535.0,) if deep else (1.0, 255.0) if image.mode == "F" else (255.0,)
        fitting = [depth for depth in depths if depth * _LEAST_SHARE <= high <= depth]
        if low < 0 or not fitting:  # `fitting` is also empty if a value is NaN
            kind = "16 bits" if deep else "floats" if image.mode == "F" else "32 bits"
            raise _unknown(f"values of {kind} from {low:g} to {high:g}")
        limits = (0.0, fitting[0])
    shares = (values.astype(np.float64) - limits[0]) / (limits[1] - limits[0])
    grey = (255 * np.nan_to_num(shares).clip(0, 1) + 0.5).astype(np.uint8)
    greys = np.count_nonzero(np.bincount(grey.ravel()))
    if greys <= 2 < len(np.unique(values)):
        raise UnknownRangeError(
            f"black and white do not fit: values from {low:g} to {high:g} become one or two greys "
            f"between {limits[0]:g} and {limits[1]:g} (recipe key: image.range)"
        )
    return Image.fromarray(grey)


def _unknown(found: str) -> UnknownRangeError:
    return UnknownRangeError(
        f"black and white are not known: {found}; give them with "
        f"`dupr prepare --set image.range=[LOW, HIGH]`"
    )


def open_picture(file: Path | BinaryIO) -> Picture:
    """Open an image and read only its header.

    Raises one of IMAGE_ERRORS if the file is not an image.
    """
    image = Image.open(file)
    raw_modes = str([tile.args for tile in getattr(image, "tile", ())])
    deep = (
        image.mode.startswith("I;16")
        or (";16" in raw_modes and ";16S" not in raw_modes)
        or (image.format == "PPM" and image.mode == "I")
    )
    tags = getattr(image, "tag_v2", None)
    # Since Pillow 11, the size of a TIFF is that of the upright image.
    stored = image.size if tags is None else (tags[_WIDTH], tags[_HEIGHT])
    picture = Picture(image, stored, deep)
    if image.format == "TIFF":
        _ = picture.orientation  # cached now, because decoding removes the tag
    return picture


def _tag(image: Image.Image) -> int:
    """The orientation of an image, or 1 if its tag is missing, invalid or damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except StoppedRunError:
        raise
    except Exception:  # on damaged metadata, parsers raise exceptions of any kind
        return 1
    return int(orientation) if orientation in _TURN else 1
