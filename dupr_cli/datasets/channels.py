"""Decodes an image file to the values that it holds, for sets that keep channels and depth.

    picture = open_channels(file)      # reads the header: size, orientation, channels, depth
    picture.values()                   # upright (H, W, C), uint8 or uint16, as the file has them
    picture.image(pixels)              # the same in 0..1, as a `ChannelImage`

PNG, JPEG and other formats of Pillow are read if Pillow gives their values unchanged, NumPy's .npy
arrays of (H, W) or (H, W, C), and TIFF: of one channel by Pillow, of several by tifffile, because
Pillow drops all channels after the third or fourth. A file whose values would have to be
reinterpreted (palettes, white stored as 0, floats, signed numbers, less than 8 bits) is refused.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dupr_cli.artifacts.pixel_formats import AnyImage, ChannelImage, PixelFormat, counted
from dupr_cli.datasets.pixels import IMAGE_ERRORS, Picture, UnknownRangeError, open_picture
from dupr_cli.errors import StoppedRunError

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow's modes whose values are those of the file, and the channels that they have.
_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I;16B": 1, "I;16L": 1}
_SAMPLES, _PHOTOMETRIC, _WHITE_IS_ZERO = 277, 262, 0  # tags of TIFF, and a value of the second
# Axes of tifffile that are channels: samples of a pixel, channels, or pages without a meaning.
_CHANNEL_AXES = "SCQI"


class ChannelError(ValueError):
    """The values of a file cannot be kept as they are, and why."""


@dataclass(frozen=True)
class ChannelPicture:
    """An image whose values need not be decoded yet.

    stored: width and height in pixels as the file holds them. depth: bits of a value, 8 or 16.
    format: PNG, JPEG, NPY, TIFF, ...
    """

    stored: tuple[int, int]
    channels: int
    depth: int
    format: str
    _decode: Callable[[], NDArray[Any]]
    _orientation: Callable[[], int]

    @cached_property
    def orientation(self) -> int:
        """1 to 8 as in EXIF. A PNG may have to be decoded to find it; raises as `values` does."""
        return self._orientation()

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def values(self) -> NDArray[Any]:
        """Upright (H, W, C), uint8 or uint16. Raises as decoders do if the file is damaged."""
        values = self._decode().astype(np.uint8 if self.depth == 8 else np.uint16)
        return _turned(values.reshape(*values.shape[:2], -1), self.orientation)

    def image(self, pixels: PixelFormat) -> ChannelImage:
        """The upright image, scaled. Raises ChannelError if it has another number of channels,
        UnknownRangeError if its values do not fit the range, and as `values` does."""
        if self.channels != pixels.channels:
            raise ChannelError(
                f"it has {counted(self.channels)}, but {counted(pixels.channels)} are expected"
            )
        values = self.values()
        # Channel after channel in memory, as resizing reads them.
        scaled = pixels.scaled(np.ascontiguousarray(values.transpose(2, 0, 1))).transpose(1, 2, 0)
        if scaled.min() == scaled.max() and values.min() < values.max():
            raise UnknownRangeError(
                f"black and white do not fit: all values, from {values.min()} to {values.max()}, "
                f"are outside {pixels.range[0]:g} to {pixels.range[1]:g}"
            )
        return ChannelImage(scaled)


def open_channels(file: Path | BinaryIO) -> ChannelPicture:
    """Open an image and read only its header.

    Raises ChannelError if its values cannot be kept, another of IMAGE_ERRORS if it is no image.
    """
    opened = io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file
    start = opened.read(len(_NPY))
    opened.seek(0)
    with _damage_as_channel_error("its header is damaged"):
        if start == _NPY:
            return _open_npy(opened)
        if start.startswith(_TIFF):
            return _open_tiff(opened)
        return _open_with_pillow(open_picture(opened))


def open_as(file: Path | BinaryIO, pixels: PixelFormat | None) -> Picture | ChannelPicture:
    """Open an image of this format, None for RGB; raises as `open_picture` or `open_channels`."""
    return open_picture(file) if pixels is None else open_channels(file)


def decode_as(file: Path | BinaryIO, pixels: PixelFormat | None) -> AnyImage:
    """The upright image in this format, None for RGB. Raises one of IMAGE_ERRORS."""
    if pixels is None:
        return open_picture(file).rgb()
    return open_channels(file).image(pixels)


@contextmanager
def _damage_as_channel_error(what: str) -> Iterator[None]:
    """On damaged files, readers raise exceptions of any kind: those become ChannelErrors."""
    try:
        yield
    except (StoppedRunError, MemoryError, *IMAGE_ERRORS):
        raise
    except Exception as error:
        raise ChannelError(f"{what}: {error}") from error


def _open_npy(file: BinaryIO) -> ChannelPicture:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)  # fmt: skip
    if read is None:
        raise ChannelError(
            f"an array of NumPy's format {version[0]}.{version[1]}, which is not read"
        )
    shape, _, dtype = read(file)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ChannelError(f"an array of {len(shape)} axes {list(shape)}, not (H, W) or (H, W, C)")
    channels = shape[2] if len(shape) == 3 else 1

    def decode() -> NDArray[Any]:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)

    stored = (shape[1], shape[0])
    return ChannelPicture(stored, channels, _depth(dtype), "NPY", decode, lambda: 1)


def _depth(dtype: np.dtype[Any]) -> int:
    """8 or 16. Raises ChannelError for values of another type."""
    if dtype.kind == "u" and dtype.itemsize in (1, 2):
        return 8 * dtype.itemsize
    kind = {"f": "floats", "i": "signed integers", "u": "unsigned integers", "b": "bits"}
    raise ChannelError(
        f"its values are {kind.get(dtype.kind, str(dtype))} of {8 * dtype.itemsize} bits; only "
        f"unsigned integers of 8 and 16 bits are kept; convert it"
    )


def _open_with_pillow(picture: Picture) -> ChannelPicture:
    image = picture.image
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG, followed by a preview
        raise ChannelError(f"it has {frames} frames")
    if image.mode not in _MODES:
        raise ChannelError(
            f"its values are not unsigned integers of 8 or 16 bits for each channel (it has "
            f"Pillow's mode {image.mode}); convert it"
        )
    raw_mode = _raw_mode(image)
    if picture.deep and not image.mode.startswith("I;16"):
        raise ChannelError(
            "16 bits of several channels are read from TIFF and .npy only, because Pillow reduces "
            "them to 8; convert it"
        )
    if image.mode == "L" and ";" in raw_mode:
        raise ChannelError(
            f"its greys have fewer than 8 bits, or white is stored as 0 ({raw_mode})"
        )
    return ChannelPicture(
        picture.stored,
        _MODES[image.mode],
        16 if image.mode.startswith("I;16") else 8,
        image.format or "",
        lambda: np.array(image),
        lambda: picture.orientation,
    )


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the values in the file, where a decoder needs it."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles else ()
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _open_tiff(file: BinaryIO) -> ChannelPicture:
    try:
        picture: Picture | None = open_picture(file)
    except IMAGE_ERRORS:  # Pillow knows only some combinations of channels and depths
        picture = None
    if picture is not None:
        tags = getattr(picture.image, "tag_v2", {})
        alone = tags.get(_SAMPLES, 1) == 1 and getattr(picture.image, "n_frames", 1) == 1
        if alone and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise ChannelError("white is stored as 0 (PhotometricInterpretation); convert it")
        # Pillow turns a TIFF while it decodes it, unlike all other formats.
        if alone and picture.orientation == 1:
            return _open_with_pillow(picture)
    file.seek(0)
    return _open_with_tifffile(file)


def _open_with_tifffile(file: BinaryIO) -> ChannelPicture:
    try:
        import tifffile
    except ImportError:
        raise ChannelError(
            "a TIFF of several channels, or one that is turned, needs tifffile; "
            "`pip install 'dupr-cli[tiff]'`"
        ) from None
    # It logs whatever is odd about a file; a file that cannot be read is reported with its reason.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(file) as tiff:
        if len(tiff.series) != 1:
            raise ChannelError(f"a TIFF of {len(tiff.series)} images; give one image a file")
        series, page = tiff.series[0], cast(Any, tiff.pages.first)
        shape, axes, dtype = series.shape, series.axes, series.dtype
        photometric = page.photometric.name
        orientation = int(page.tags.valueof(274, default=1))
    others = [axis for axis in axes if axis not in "YX"]
    if (
        "Y" not in axes
        or "X" not in axes
        or len(others) > 1
        or "".join(others) not in _CHANNEL_AXES
    ):
        raise ChannelError(f"a TIFF with the axes {axes} {list(shape)}, not one image of channels")
    if photometric not in ("MINISBLACK", "RGB"):
        raise ChannelError(f"a TIFF whose values are not brightness ({photometric}); convert it")
    sides = dict(zip(axes, shape, strict=True))
    channels = sides[others[0]] if others else 1
    order = [axes.index(axis) for axis in ("Y", "X", *others)]

    def decode() -> NDArray[Any]:
        file.seek(0)
        with _damage_as_channel_error("it is damaged"), tifffile.TiffFile(file) as tiff:
            return np.asarray(tiff.series[0].asarray()).transpose(order)

    orientation = orientation if 1 <= orientation <= 8 else 1
    stored = (sides["X"], sides["Y"])
    return ChannelPicture(stored, channels, _depth(dtype), "TIFF", decode, lambda: orientation)


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """(H, W, C) values turned upright. Source: EXIF 2.3, tag Orientation."""
    if orientation >= 5:
        values = values.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values
