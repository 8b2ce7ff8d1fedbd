"""Perceptual hashes of 64 bits, to find duplicates within a set and leaks between two sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _FREQUENCIES = 32, 8  # side of the thumbnail in pixels, frequencies per axis in the hash
_BITS_OF_BYTE = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def _cosines() -> NDArray[np.float64]:
    """Rows of the DCT-II that the hash uses."""
    frequency, position = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None]
    cosines: NDArray[np.float64] = np.cos(np.pi * (2 * position + 1) * frequency / (2 * _SIDE))
    return cosines


_COSINES = _cosines()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of how an image looks: signs of its lowest frequencies against their median.

    Source: pHash, as the imagehash library computes it (`phash`): 32 x 32 grey, DCT, 8 x 8 kept.
    """
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    bits = (low > np.median(low)).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def count_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Number of set bits of each value."""
    as_bytes = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 8)
    counts: NDArray[Any] = _BITS_OF_BYTE[as_bytes].sum(-1)
    return counts
