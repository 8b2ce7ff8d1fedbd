"""How an image looks, as 64 bits: for duplicates within a set, and leaks from one into another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _KEPT = 32, 8  # pixels of the thumbnail, frequencies of the hash
_BITS_OF_BYTE = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def _cosines() -> NDArray[np.float64]:
    """Rows of the DCT-II that the hash keeps."""
    frequency, position = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    cosines: NDArray[np.float64] = np.cos(np.pi * (2 * position + 1) * frequency / (2 * _SIDE))
    return cosines


_COSINES = _cosines()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of how an image looks: signs of its lowest frequencies against their median.

    Source: pHash, as the imagehash library computes it (`phash`): 32 x 32 grey, DCT, 8 x 8 kept.
    """
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kept = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    bits = (kept > np.median(kept)).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def count_bits(values: NDArray[Any]) -> NDArray[Any]:
    """How many bits are set in each."""
    as_bytes = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 8)
    counts: NDArray[Any] = _BITS_OF_BYTE[as_bytes].sum(-1)
    return counts
