"""Reads Cityscapes: street scenes whose *_instanceIds.png draw their objects.

    leftImg8bit/<split>/<city>/<id>_leftImg8bit.png    gtFine/<split>/<city>/<id>_gtFine_*.png

A pixel of instance n of class c has the value 1000 c + n. A pixel with the value c belongs to a
group without separate instances, which becomes a crowd. Source: cityscapesScripts,
helpers/labels.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.datasets.placement import Labels
from dupr_cli.errors import RunError, UsageError

# Ids of the classes that have instances.
_CITYSCAPES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip


class CityscapesSplit:
    """Images of one split of Cityscapes, with their instances."""

    def __init__(self, root: Path, split: str) -> None:
        self._images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not self._images:
            known = sorted(p.name for p in (root / "leftImg8bit").iterdir() if p.is_dir())
            raise UsageError(
                f"{root}: leftImg8bit has no images of a split {split!r}; its splits are "
                f"{', '.join(known) or 'none'}."
            )
        self._labels = root / "gtFine" / split
        self.ids = [path.name.removesuffix("_leftImg8bit.png") for path in self._images]
        self.notes: list[str] = []

    def place(self, number: int) -> str:
        return str(self._images[number])

    def image(self, number: int) -> BinaryIO:
        return self._images[number].open("rb")

    def annotation(self, number: int, kind: str) -> Path:
        """Path of the annotation of an image, such as its instanceIds."""
        city = self._images[number].parent.name
        return self._labels / city / f"{self.ids[number]}_gtFine_{kind}.png"

    def labels(self, number: int) -> Labels:
        """Raises RunError when the annotation is missing or does not decode."""
        path = self.annotation(number, "instanceIds")
        try:
            with Image.open(path) as image:
                drawn = np.asarray(image)
        except FileNotFoundError:
            raise RunError(f"{path}: the annotation is missing.") from None
        except IMAGE_ERRORS as error:
            raise RunError(f"{path}: the annotation cannot be decoded ({error}).") from error
        boxes = []
        for value in np.unique(drawn).tolist():
            name = _CITYSCAPES.get(value // 1000 if value >= 1000 else value)
            if name is None:
                continue
            mask = np.asfortranarray(drawn == value)
            x, y, width, height = coco_mask.toBbox(coded := coco_mask.encode(mask)).tolist()
            outline = {"size": coded["size"], "counts": coded["counts"].decode()}
            crowd = value < 1000
            details = {"segmentation": outline}
            boxes.append(Box(name, x, y, x + width, y + height, crowd=crowd, details=details))
        return Labels(tuple(boxes), (drawn.shape[1], drawn.shape[0]))
