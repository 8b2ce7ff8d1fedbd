"""Images that keep their own channels and depth, for sensors whose images are not RGB of 8 bits.

A set of such images has one `PixelFormat`: its number of channels, and the values that become 0 and
1. Shards keep the values of the source; they are scaled when an image is decoded, into a
`ChannelImage`. That class has those methods of Pillow's images that cut, resize and mirror, so that
views and detectors' input are made by the same code for both. No format (None) means RGB of 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PixelFormat:
    """What all images of a set have in common. range: the values that become 0 and 1."""

    channels: int
    range: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.range
        return f"{counted(self.channels)} with values from {low:g} to {high:g}"

    def to_json(self) -> dict[str, object]:
        return {"channels": self.channels, "range": list(self.range)}

    @classmethod
    def from_json(cls, value: object) -> PixelFormat | None:
        """None for a value that is no format: other tools may use the name for something else."""
        if not isinstance(value, Mapping):
            return None
        channels, limits = value.get("channels"), value.get("range")
        if not isinstance(channels, int) or not isinstance(limits, list | tuple):
            return None
        if len(limits) != 2 or not all(isinstance(limit, int | float) for limit in limits):
            return None
        # Values are of 16 bits at most; these bounds exclude NaN and numbers that are no float.
        if channels < 1 or not all(-(2**32) <= limit <= 2**32 for limit in limits):
            return None
        if limits[0] >= limits[1]:
            return None
        return cls(channels, (float(limits[0]), float(limits[1])))

    def scaled(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values of any shape as shares of the range; those outside it become 0 or 1."""
        if values.dtype in (np.uint8, np.uint16) and values.size > np.iinfo(values.dtype).max:
            # Looking the result of every possible value up takes half the time of computing it.
            every = np.arange(np.iinfo(values.dtype).max + 1)
            found: NDArray[np.float32] = self._shares(every)[values]
            return found
        return self._shares(values)

    def _shares(self, values: NDArray[Any]) -> NDArray[np.float32]:
        low, high = self.range
        shares = (values.astype(np.float64) - low) / (high - low)
        return shares.clip(0, 1).astype(np.float32)


def counted(channels: int) -> str:
    """`1 channel` or `5 channels`."""
    return f"{channels} channel{'s' * (channels != 1)}"


def described(pixels: PixelFormat | None) -> str:
    """The format in words, for messages."""
    return "RGB images of 8 bits" if pixels is None else f"images of {pixels}"


@dataclass(frozen=True)
class NetworkInput:
    """What a network takes. mean, std: of each channel, in 0..1. pixels: None for RGB of 8 bits."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pixels: PixelFormat | None = None

    @property
    def channels(self) -> int:
        return len(self.mean)


RGB_INPUT = NetworkInput()


@dataclass(frozen=True)
class ChannelImage:
    """An upright image with its own channels. values: (H, W, C) float32 in 0..1, fastest to resize
    if each channel is contiguous in memory."""

    values: NDArray[np.float32]

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    @property
    def height(self) -> int:
        return int(self.values.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: Box | None = None
    ) -> ChannelImage:
        """Like Pillow's: antialiased, without moving pixels. size: width, height. box: the part
        taken, x0, y0, x1, y1 in pixels; all by default."""
        return ChannelImage(resized(self.values, size, resample, box).clip(0, 1))

    def crop(self, box: tuple[int, int, int, int]) -> ChannelImage:
        """The part x0, y0, x1, y1 in pixels, inside the image."""
        x0, y0, x1, y1 = box
        return ChannelImage(self.values[y0:y1, x0:x1])

    def mirrored(self) -> ChannelImage:
        """Left and right exchanged."""
        return ChannelImage(self.values[:, ::-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype, copy=copy)

    def shown(self) -> Image.Image:
        """The image as people can see it: the first three channels as red, green and blue, or the
        first as grey if there are fewer."""
        first = self.values[..., :3] if self.values.shape[2] >= 3 else self.values[..., 0]
        return Image.fromarray((255 * first + 0.5).astype(np.uint8)).convert("RGB")


def how_shown(pixels: PixelFormat) -> str:
    """In words, what `ChannelImage.shown` shows of such images."""
    if pixels.channels >= 3:
        return f"the first three of {pixels.channels} channels as red, green and blue"
    return "the channel as grey" if pixels.channels == 1 else "the first of 2 channels as grey"


# An upright image, decoded: in RGB of 8 bits, or with its own channels.
AnyImage = Image.Image | ChannelImage


def as_picture(image: AnyImage) -> Image.Image:
    """The image in RGB, for pictures; see `ChannelImage.shown`."""
    return image.shown() if isinstance(image, ChannelImage) else image


def resized(
    values: NDArray[Any], size: tuple[int, int], resample: Image.Resampling, box: Box | None = None
) -> NDArray[np.float32]:
    """(H, W, C) values of any type, resized to (height, width, C) as `ChannelImage.resize` does.

    A filter with negative lobes may exceed the values that are there.
    """
    planes = [
        Image.fromarray(np.ascontiguousarray(values[..., channel], dtype=np.float32))
        for channel in range(values.shape[2])
    ]
    return np.stack([np.asarray(plane.resize(size, resample, box)) for plane in planes], axis=2)
