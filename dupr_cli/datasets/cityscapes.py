"""Reads Cityscapes: street scenes whose *_instanceIds.png draw their objects.

    leftImg8bit/<split>/<city>/<id>_leftImg8bit.png    gtFine/<split>/<city>/<id>_gtFine_*.png

A pixel of instance n of class c has the value 1000 c + n. A pixel with the value c belongs to a
group without separate instances, which becomes a crowd. Pixels of some classes are void: they count
for nothing. gtInstances.json, if it lies in gtFine or beside it, gives the distances of instances.
Source: cityscapesScripts, helpers/labels.py and evaluation/evalInstanceLevelSemanticLabeling.py.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.datasets.placement import Labels
from dupr_cli.errors import RunError, UsageError
from dupr_cli.metrics.types import Rle
from dupr_cli.parsing import ParseError, read_json, validated

# Ids of the classes that have instances.
_CITYSCAPES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
# Ids of the classes that no evaluation counts.
_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
_INSTANCES = "gtInstances.json"


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
        self._distances = _read_distances(root)

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
        drawn = self._drawn(number)
        distances = self._distances.get(self.annotation(number, "instanceIds").name, {})
        boxes = []
        for value in np.unique(drawn).tolist():
            name = _CITYSCAPES.get(value // 1000 if value >= 1000 else value)
            if name is None:
                continue
            mask = np.asfortranarray(drawn == value)
            x, y, width, height = coco_mask.toBbox(coded := coco_mask.encode(mask)).tolist()
            outline = {"size": coded["size"], "counts": coded["counts"].decode()}
            crowd = value < 1000
            details: dict[str, Any] = {"segmentation": outline}
            if value in distances:
                details["distance"] = distances[value]
            boxes.append(Box(name, x, y, x + width, y + height, crowd=crowd, details=details))
        return Labels(tuple(boxes), (drawn.shape[1], drawn.shape[0]))

    def void(self, number: int) -> Rle:
        """The pixels that belong to no class. Raises RunError as `labels` does."""
        coded = coco_mask.encode(np.asfortranarray(np.isin(self._drawn(number), _VOID)))
        return Rle(size=list(coded["size"]), counts=coded["counts"].decode())

    def _drawn(self, number: int) -> NDArray[np.int32]:
        path = self.annotation(number, "instanceIds")
        try:
            with Image.open(path) as image:
                return np.asarray(image).astype(np.int32)
        except FileNotFoundError:
            raise RunError(f"{path}: the annotation is missing.") from None
        except IMAGE_ERRORS as error:
            raise RunError(f"{path}: the annotation cannot be decoded ({error}).") from error


def _read_distances(root: Path) -> dict[str, dict[int, list[float]]]:
    """Median distance in metres and its confidence, by the annotation's name and the instance.

    Raises UsageError for a file that is not as cityscapesScripts writes it.
    """
    found = [path for path in (root / "gtFine" / _INSTANCES, root / _INSTANCES) if path.is_file()]
    if not found:
        return {}
    try:
        images = validated(dict[str, dict[str, list[dict[str, float]]]], read_json(found[0]))
    except (OSError, ParseError) as error:
        raise UsageError(
            f"{found[0]}: not the instances that cityscapesScripts writes ({error}). Make it "
            f"again, or remove it to evaluate without distances."
        ) from error
    return {
        PurePosixPath(name).name: {
            int(each["instID"]): [each["medDist"], each["distConf"]]
            for instances in classes.values()
            for each in instances
            if each.keys() >= {"instID", "medDist", "distConf"}
        }
        for name, classes in images.items()
    }
