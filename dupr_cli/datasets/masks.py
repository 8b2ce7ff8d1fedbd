"""Reads semantic masks: PNG files whose pixels are class numbers, grey or with a palette.

A number is that of a class, or `IGNORE` where nothing is to be learned or measured. Colours do not
matter: a palette is for people, so masks in colours (RGB) cannot be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.errors import RunError
from dupr_cli.metrics.semantic import IGNORE

Mask = NDArray[np.uint8]


def read_mask(file: Path | BinaryIO, place: str) -> Mask:
    """(height, width) numbers of a mask as its file stores them.

    place: of the mask, for messages. Raises RunError when it is missing, damaged, or no mask.
    """
    try:
        with Image.open(file) as image:
            if image.mode in ("1", "L", "P"):
                return np.array(image).astype(np.uint8)
            mode = image.mode
    except FileNotFoundError:
        raise RunError(
            f"{place}: the mask is missing. Add it, or take the image off the list."
        ) from None
    except IMAGE_ERRORS as error:
        raise RunError(
            f"{place}: the mask cannot be decoded ({error}). Replace it, or take the image off the "
            f"list."
        ) from error
    kind = "more than 8 bits" if mode[0] in "IF" else f"colours ({mode})"
    raise RunError(
        f"{place}: the mask has {kind} per pixel, but class numbers are needed. Save it as a PNG "
        f"of 8 bits, grey or with a palette, whose values are the numbers of the classes and "
        f"{IGNORE} where nothing is labelled."
    )


def require_classes(mask: Mask, classes: int, place: str) -> None:
    """Raises RunError when a pixel has neither the number of a class nor IGNORE."""
    beyond = mask[(mask >= classes) & (mask != IGNORE)]
    if beyond.size:
        raise RunError(
            f"{place}: the mask has the value {beyond.max()}, but there are {classes} classes, "
            f"0 to {classes - 1}. Correct the mask or the list of classes; {IGNORE} means not "
            f"labelled."
        )
