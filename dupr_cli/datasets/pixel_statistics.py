"""Mean and standard deviation of each channel of images, over their pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.pixel_formats import NetworkInput
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.shards import kept_format

# A channel may be constant, and a division needs a deviation above 0.
LEAST_STD = 1e-3
_IMAGES = 200  # enough for a mean to two digits, read in seconds


class PixelSums:
    """Sums over the pixels of all images added."""

    def __init__(self, channels: int) -> None:
        self._sums, self._pixels = np.zeros((2, channels)), 0

    def add(self, values: NDArray[np.floating]) -> None:
        """values: (H, W, C) of one image, in 0..1."""
        rows = values.reshape(-1, values.shape[2]).astype(np.float64)
        self._sums += [rows.sum(0), (rows**2).sum(0)]
        self._pixels += len(rows)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of each channel."""
        mean = self._sums[0] / self._pixels
        std = np.sqrt(np.maximum(0, self._sums[1] / self._pixels - mean**2))
        return mean.tolist(), std.tolist()


def measured_input(address: str) -> NetworkInput | None:
    """The input of a network for shards whose images keep their channels, measured on some of them;
    None for other sets.

    Raises UsageError when the shards cannot be opened, RunError when one is damaged, and one of
    IMAGE_ERRORS when an image is.
    """
    pixels = kept_format(address)
    if pixels is None:
        return None
    shards, sums = open_shards(address), PixelSums(pixels.channels)
    for number in range(0, len(shards), max(1, len(shards) // _IMAGES)):
        sums.add(np.asarray(decode_as(io.BytesIO(shards[number].image), pixels)))
    mean, std = sums.mean_and_std()
    return NetworkInput(tuple(mean), tuple(max(value, LEAST_STD) for value in std), pixels)
