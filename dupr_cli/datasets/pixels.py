"""The pixels of an image file: upright, RGB, 8 bits, the same for every stage.

    picture = open_picture(file)       # the header: size, orientation; nothing is decoded
    picture.rgb()                      # upright RGB image

Orientation, size and pixels belong together: a TIFF turns itself while Pillow decodes it, a PNG may
carry its tag behind its pixels, and a tag in damaged EXIF counts as none. So an image is opened
once, here, and everything else asks the `Picture`.
Source: `PIL.ImageOps.exif_transpose`, which decides what upright is (EXIF 2.3, tag Orientation, and
XMP's tiff:Orientation).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dupr_cli.errors import StoppedRunError

# What opening and decoding a damaged image raises, save for some plugins' own mistakes.
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
# A file that does not reach this share of its depth may as well be 12 bits in 16.
_LEAST_SHARE = 1 / 4


class UnknownRangeError(ValueError):
    """Which values of an image are black and white is not known."""


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
        """1 to 8. A PNG's may lie behind its pixels, which are decoded then; raises as `rgb`."""
        if self.image.format == "PNG" and "exif" not in self.image.info:
            self.image.load()
        return _tag(self.image)

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as the image is seen."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    @property
    def is_wide(self) -> bool:
        """Whether a value may have more than 8 bits, so that only decoding tells its range."""
        return self.deep or self.image.mode[0] in "IF"

    def rgb(
        self,
        size: tuple[int, int] | None = None,
        resample: Image.Resampling = Image.Resampling.LANCZOS,
        limits: tuple[float, float] | None = None,
    ) -> Image.Image:
        """The upright image in RGB; transparency is laid over white.

        size: to shrink it to, upright, pixels. limits: values of black and white of images with
        more than 8 bits; by default those of their depth, as far as it is known.
        Raises UnknownRangeError where it is not, OSError, ValueError or SyntaxError where the image
        is damaged.
        """
        image, box = self.image, None
        size = size or self.upright
        if size != self.upright:
            # libjpeg shrinks by a power of two while it decodes; twice the size is left to the
            # filter.
            wide, high = size[::-1] if self.orientation >= 5 else size
            drafted = image.draft("RGB", (2 * wide, 2 * high))
            box = drafted[1] if drafted else None
        image.load()
        # A TIFF has turned itself by now.
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
        rgb.info = {}  # no stale EXIF, no profile of another colour space
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
                    f"exceed {highest} of 255; convert it to 8 bits, or take it as it is with "
                    f"`dupr prepare --set image.range=[0, 65535]`"
                )
        return rgb


def _grey(image: Image.Image, deep: bool, limits: tuple[float, float] | None) -> Image.Image:
    """8 bits of integers or floats: black and white are `limits`, or those of a depth that fits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if limits is None:
        depths = (65535.0,) if deep else (1.0, 255.0) if image.mode == "F" else (255.0,)
        fitting = [depth for depth in depths if depth * _LEAST_SHARE <= high <= depth]
        if low < 0 or not fitting:  # also where a value is not a number
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
        f"black and white are not known: {found}; `dupr prepare --set image.range=[LOW, HIGH]` "
        f"says which values they are"
    )


def open_picture(file: Path | BinaryIO) -> Picture:
    """Open an image, decoding no more than its header needs.

    Raises one of IMAGE_ERRORS when it is none.
    """
    image = Image.open(file)
    raw_modes = str([tile.args for tile in getattr(image, "tile", ())])
    deep = (
        image.mode.startswith("I;16")
        or (";16" in raw_modes and ";16S" not in raw_modes)
        or (image.format == "PPM" and image.mode == "I")
    )
    tags = getattr(image, "tag_v2", None)
    # From Pillow 11 on, the size of a TIFF is that of the upright image.
    stored = image.size if tags is None else (tags[_WIDTH], tags[_HEIGHT])
    picture = Picture(image, stored, deep)
    if image.format == "TIFF":
        _ = picture.orientation  # decoding takes the tag away
    return picture


def _tag(image: Image.Image) -> int:
    """The orientation of an image, 1 where it has none, one that is no orientation, or damage."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except StoppedRunError:
        raise
    except Exception:  # parsers of damaged metadata raise whatever they ran into
        return 1
    return int(orientation) if orientation in _TURN else 1
