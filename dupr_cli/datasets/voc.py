"""PASCAL VOC trees, read: VOCdevkit/VOC2007 and its kind, any year, any class list.

    JPEGImages/<id>.jpg    Annotations/<id>.xml    ImageSets/Main/<split>.txt

VOC counts pixels from 1 and includes both ends of a box; here boxes are pixel edges, counted from
0 and half-open, so that x_max - x_min is the width: x_min - 1, y_min - 1, x_max, y_max.
Source: the VOC development kit's annotation format.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.labels import Box
from dupr_cli.errors import RunError, UsageError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG")


@dataclass(frozen=True)
class Annotation:
    """Objects of an image, and the (width, height) in pixels for which they were drawn."""

    boxes: list[Box]
    size: tuple[int, int] | None


@dataclass(frozen=True)
class VocTree:
    """One year's folder of a VOC tree."""

    root: Path

    @property
    def splits(self) -> list[str]:
        """Names of ImageSets/Main/*.txt that list images (not the per-class files)."""
        files = sorted((self.root / "ImageSets" / "Main").glob("*.txt"))
        names = {file.stem for file in files}
        # aeroplane_train.txt holds the labels of one class over train.txt, not a split.
        return [n for n in sorted(names) if not ("_" in n and n.rpartition("_")[2] in names)]

    def image_ids(self, split: str) -> list[str]:
        """Ids of a split, in the order of its file.

        Raises UsageError for an unknown split, or a list that is no text.
        """
        path = self.root / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            raise UsageError(
                f"{path}: there is no split {split!r}; the tree has {', '.join(self.splits)}."
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: the list is not UTF-8 text ({error}). Save it as UTF-8."
            ) from error
        return [line.split()[0] for line in lines if line.strip()]

    def image_path(self, image_id: str) -> Path:
        """Path of an image, which need not exist."""
        candidates = [self.root / "JPEGImages" / f"{image_id}{s}" for s in _IMAGE_SUFFIXES]
        return next((path for path in candidates if path.is_file()), candidates[0])

    def boxes(self, image_id: str) -> list[Box]:
        """Objects of one image; see `annotation`."""
        return self.annotation(image_id).boxes

    def annotation(self, image_id: str) -> Annotation:
        """What is known of one image; `part` boxes inside objects are not objects.

        Raises RunError when the annotation is missing or not as VOC writes it.
        """
        path = self.root / "Annotations" / f"{image_id}.xml"
        try:
            root = ET.parse(path).getroot()
        except FileNotFoundError:
            raise RunError(f"{path}: the annotation is missing.") from None
        except (ET.ParseError, ValueError, LookupError) as error:
            # The last two: an encoding that Python's parser does not know.
            raise RunError(
                f"{path}: not valid XML: {error}. Is it in the encoding that its first line names, "
                f"UTF-8 where it names none?"
            ) from error
        width, height = (root.findtext(f"size/{side}") or "" for side in ("width", "height"))
        size = (int(width), int(height)) if width.isdigit() and height.isdigit() else None
        return Annotation(
            [_parse_object(element, path) for element in root.findall("object")], size
        )


def _parse_object(element: ET.Element, path: Path) -> Box:
    name = (element.findtext("name") or "").strip()
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{tag}")
        try:
            corner = float(text or "")
        except ValueError:
            corner = math.nan
        if not math.isfinite(corner):
            raise RunError(
                f"{path}: object {name!r}: bndbox/{tag} is {text!r}, but a number is needed."
            )
        corners.append(corner)
    x_min, y_min, x_max, y_max = corners
    return Box(
        name=name,
        x_min=x_min - 1,
        y_min=y_min - 1,
        x_max=x_max,
        y_max=y_max,
        difficult=(element.findtext("difficult") or "0").strip() == "1",
        truncated=(element.findtext("truncated") or "0").strip() == "1",
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir fails for a link that leads round in a circle.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()


def find_voc_trees(path: Path) -> list[VocTree]:
    """The years of a VOC tree: `path` itself, or VOC* folders in it or in its VOCdevkit.

    Returns an empty list where `path` is not a VOC tree.
    """

    def is_year(folder: Path) -> bool:
        return (
            all((folder / part).is_dir() for part in ("JPEGImages", "Annotations"))
            and (folder / "ImageSets" / "Main").is_dir()
        )

    if is_year(path):
        return [VocTree(path)]
    for parent in (path, path / "VOCdevkit"):
        if parent.is_dir():
            with os.scandir(parent) as entries:  # it may be a folder of a million images
                folders = sorted(parent / entry.name for entry in entries if _is_folder(entry))
            years = [VocTree(folder) for folder in folders if is_year(folder)]
            if years:
                return years
    return []
