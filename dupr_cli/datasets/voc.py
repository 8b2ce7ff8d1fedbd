"""Reads PASCAL VOC annotations: the kit's trees, and what LabelImg, CVAT and Roboflow write.

    JPEGImages/<id>.jpg    Annotations/<id>.xml    ImageSets/Main/<split>.txt    (VOC, CVAT)
    images/<id>.png        annotations/<id>.xml                                  (no lists)
    <id>.jpg               <id>.xml                                              (LabelImg)
    train/<id>.jpg         train/<id>.xml          valid/... test/...            (Roboflow)

Without lists, every image with an annotation belongs to the split that its folder names, or to
train. VOC counts pixels from 1 and includes both ends of a box. Here boxes are pixel edges, counted
from 0 and half-open, so that x_max - x_min is the width: x_min - 1, y_min - 1, x_max, y_max.
Source: the VOC development kit's annotation format.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dupr_cli.artifacts.files import is_image_name, is_present
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.reading import UnfitImageError, require_regular
from dupr_cli.datasets.layout import split_folders, split_named
from dupr_cli.datasets.placement import Labels
from dupr_cli.datasets.text import read_text
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import MEBIBYTE, ParseError, read_limited

_LISTS = Path("ImageSets", "Main")
_PAIRS = (("JPEGImages", "Annotations"), ("images", "annotations"), ("images", "Annotations"))
_FLAG = re.compile(r"(.*\S)\s+[+-]?[01]")
_ROOT = re.compile(rb"<annotation[\s>]")
# Number of XML files that are read to recognise VOC annotations.
_PROBED_FILES = 5
# 100,000 objects have 30 MB, and in memory ten times as much.
_MAX_ANNOTATION_BYTES = 32 * MEBIBYTE


@dataclass(frozen=True)
class VocTree:
    """One year of a VOC tree, or a folder of images with annotations and without lists.

    images, annotations: folders of these, relative to the root.
    """

    root: Path
    images: str = "JPEGImages"
    annotations: str = "Annotations"
    _names: dict[Path, dict[str, list[str]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @cached_property
    def splits(self) -> list[str]:
        """Names of ImageSets/Main/*.txt that list images (not the per-class files)."""
        names = {file.stem for file in (self.root / _LISTS).glob("*.txt")}
        # aeroplane_train.txt is not a split; it holds the labels of one class for train.txt.
        found = [n for n in sorted(names) if not ("_" in n and n.rpartition("_")[2] in names)]
        return found or [split_named(self.root.name) or "train"]

    @property
    def has_lists(self) -> bool:
        return self._list(self.splits[0]).is_file()

    def _list(self, split: str) -> Path:
        return self.root / _LISTS / f"{split}.txt"

    def image_ids(self, split: str) -> list[str]:
        """Ids of a split in the order of its list; without lists, of all images and annotations.

        Raises UsageError for an unknown split, or a list that is not text.
        """
        path = self._list(split)
        if not path.is_file():
            if split in self.splits:
                return self._unlisted()
            raise UsageError(
                f"{path}: the tree has no split {split!r}; its splits are {', '.join(self.splits)}."
            )
        lines = (line.strip() for line in read_text(path).splitlines())
        return [self._listed(line) for line in lines if line]

    def _listed(self, line: str) -> str:
        """The id in a line: the whole line, or the line without VOC's class flag, quotes or
        folders."""
        flagged = _FLAG.fullmatch(line)
        plain = flagged[1] if flagged else line
        unquoted = [text[1:-1] for text in (line, plain) if re.fullmatch(r"(['\"]).*\1", text)]
        base = plain.replace("\\", "/").rpartition("/")[2]
        for image_id in (line, plain, *unquoted, base):
            if self._files(image_id) or self.is_annotated(image_id):
                return image_id
        return plain

    def _unlisted(self) -> list[str]:
        """Stems of all annotations, and of the images without one."""
        stems = set(
            _stems(self.root / self.annotations, lambda name: name.lower().endswith(".xml"))
        )
        pictured = Counter(_stems(self.root / self.images, is_image_name))
        # An annotation may name an image file with another stem than its own.
        claimed = {Path(self._stated_name(stem)).stem for stem in stems - set(pictured)}
        ids = stems | (set(pictured) - claimed)
        for stem in (stem for stem, count in pictured.items() if count > 1):
            taken = self.image_path(stem).name  # a.jpg and a.png share a.xml
            above = stem.rpartition("/")[0]
            ids |= {f"{above}/{n}".lstrip("/") for n in self._files(stem) if n != taken}
        return sorted(ids)

    def _files(self, image_id: str) -> list[str]:
        """Names of the image files of an id, the likeliest first; an id may include the suffix."""
        folder, name = _parted(self.root / self.images, image_id)
        if folder not in self._names:
            by_stem: dict[str, list[str]] = {}
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if is_image_name(entry.name):
                            by_stem.setdefault(entry.name.rpartition(".")[0], []).append(entry.name)
            self._names[folder] = by_stem
        of_stem = self._names[folder].get(name, [])
        if not of_stem:
            with_suffix = self._names[folder].get(name.rpartition(".")[0], [])
            return [n for n in with_suffix if n.lower() == name.lower()]
        kit_first = (".jpg", ".jpeg", ".png")
        return sorted(of_stem, key=lambda n: (not n.lower().endswith(kit_first), n))

    def image_path(self, image_id: str) -> Path:
        """Path of an image, which need not exist."""
        folder, name = _parted(self.root / self.images, image_id)
        files = self._files(image_id)
        if len(files) == 1:
            return folder / files[0]
        # With several images of one stem, or none, the annotation may name its file.
        stated = self._stated_name(image_id)
        if stated in files:
            return folder / stated
        if files:
            return folder / files[0]
        if stated and not self.has_lists and is_present(folder / stated):
            return folder / stated
        return folder / f"{name}.jpg"

    def _stated_name(self, image_id: str) -> str:
        """<filename> of an annotation without folders; empty if it is missing or damaged."""
        try:
            text = _parsed(self._annotation_path(image_id)).findtext("filename")
        except (OSError, RunError, ET.ParseError, ValueError, LookupError):
            return ""
        return (text or "").strip().replace("\\", "/").rpartition("/")[2]

    def _annotation_path(self, image_id: str) -> Path:
        folder, name = _parted(self.root / self.annotations, image_id)
        path = folder / f"{name}.xml"
        if is_image_name(name) and not is_present(path):
            return folder / f"{name.rpartition('.')[0]}.xml"
        return path

    def files(self, image_id: str) -> list[Path]:
        """Paths of an image and its annotation; neither need exist."""
        return [self.image_path(image_id), self._annotation_path(image_id)]

    def is_annotated(self, image_id: str) -> bool:
        return is_present(self._annotation_path(image_id))

    def boxes(self, image_id: str) -> list[Box]:
        """Objects of one image; see `labels`."""
        return list(self.labels(image_id).boxes)

    def labels(self, image_id: str) -> Labels:
        """Labels of one image; `part` boxes inside objects do not count as objects.

        Raises RunError when the annotation is missing or is not XML.
        """
        path = self._annotation_path(image_id)
        try:
            root = _parsed(path)
        except FileNotFoundError:
            raise RunError(f"{path}: the annotation is missing.") from None
        except (ET.ParseError, ValueError, LookupError) as error:
            # The last two mean an encoding that Python's parser does not know.
            raise RunError(
                f"{path}: not valid XML: {error}. Check that its encoding is the one that its "
                f"first line names, or UTF-8 if that names none."
            ) from error
        others = self._files(image_id.rpartition(".")[0]) if is_image_name(image_id) else []
        stated = self._stated_name(image_id) if len(others) > 1 else ""
        if stated in others and stated not in self._files(image_id):
            raise RunError(f"{path}: the annotation is for {stated}, so this image has none.")
        width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
        size = (int(width), int(height)) if width >= 1 and height >= 1 else None
        boxes, left_out = list[Box](), list[str]()
        for element in root.findall("object"):
            try:
                boxes.append(_parse_object(element))
            except ValueError as error:
                left_out.append(f"{path}: {error}")
        return Labels(tuple(boxes), size, left_out=tuple(left_out))


def _parted(folder: Path, image_id: str) -> tuple[Path, str]:
    """The folder of an id, and its last part: ids may include folders (day/a)."""
    above, _, name = image_id.rpartition("/")
    return folder / above, name


def _number(text: str | None) -> float:
    """The number in a text, or NaN if it is not a finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _parsed(path: Path) -> ET.Element:
    """The root of an annotation, which must be a file: a named pipe would wait for ever."""
    try:
        require_regular(path)
    except UnfitImageError as error:
        raise RunError(f"{path}: the annotation is {error}.") from None
    try:
        return ET.fromstring(read_limited(path, _MAX_ANNOTATION_BYTES))
    except ParseError as error:
        raise RunError(f"{path}: the annotation cannot be used: {error}.") from None


def _parse_object(element: ET.Element) -> Box:
    name = (element.findtext("name") or "").strip()
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{tag}")
        corner = _number(text)
        if math.isnan(corner):
            raise ValueError(f"object {name!r}: bndbox/{tag} is {text!r}, but a number is needed")
        corners.append(corner)
    if not name:
        raise ValueError("an object has no class name")
    x_min, y_min, x_max, y_max = corners
    if x_max < x_min - 1 or y_max < y_min - 1:
        raise ValueError(f"object {name!r}: its box has a negative width or height")
    return Box(
        name=name,
        x_min=x_min - 1,
        y_min=y_min - 1,
        x_max=x_max,
        y_max=y_max,
        difficult=_flag(element, "difficult"),
        truncated=_flag(element, "truncated"),
    )


def _flag(element: ET.Element, name: str) -> bool:
    return (element.findtext(name) or "").strip().lower() in ("1", "true", "yes")


def _stems(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Names of files at any depth, relative to the folder and without their suffix."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        above = PurePosixPath(Path(place).relative_to(folder).as_posix())
        for name in files:
            if wanted(name) and not name.startswith("."):
                yield (above / name.rpartition(".")[0]).as_posix()


def _is_annotated(folder: Path) -> bool:
    """Whether the folder holds VOC's XML files."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        names = (e.name for e in entries if e.name.lower().endswith(".xml"))
        probed = list(islice(names, _PROBED_FILES))
    files = (folder / name for name in probed)
    return any(file.is_file() and _ROOT.search(_start(file)) for file in files)


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        # In UTF-16, every ASCII character has a zero byte.
        return opened.read(4096).replace(b"\0", b"")


def find_voc_trees(path: Path) -> list[VocTree]:
    """The years of a VOC tree: `path` itself, or folders in it or in its VOCdevkit; or the folders
    of images and annotations that other tools write.

    Returns an empty list if `path` is none of these.
    """
    if _is_year(path):
        return [VocTree(path)]
    for parent in (path, path / "VOCdevkit"):
        if parent.is_dir():
            with os.scandir(parent) as entries:  # the folder may hold a million images
                folders = sorted(parent / entry.name for entry in entries if _is_folder(entry))
            years = [VocTree(folder) for folder in folders if _is_year(folder)]
            if years:
                return years
    alone = _unlisted_tree(path)
    if alone:
        return [alone]
    found = (_unlisted_tree(folder) for folder in split_folders(path))
    return [tree for tree in found if tree]


def _is_year(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in ("JPEGImages", "Annotations", _LISTS))


def _unlisted_tree(folder: Path) -> VocTree | None:
    for images, labels in _PAIRS:
        if (folder / images).is_dir() and _is_annotated(folder / labels):
            return VocTree(folder, images, labels)
    return VocTree(folder, ".", ".") if _is_annotated(folder) else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir fails for a symbolic link that points to itself.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()


def trees_of_split(trees: Sequence[VocTree], split: str, address: str) -> list[tuple[VocTree, str]]:
    """The lists that make up a split: `trainval` of every year, or `2007/trainval` of one.

    Raises UsageError if no tree has the split.
    """
    year, _, name = split.rpartition("/")
    of_year = [tree for tree in trees if not year or tree.root.name.endswith(year)]
    found = [(tree, name) for tree in of_year if name in tree.splits]
    if not found:
        known = sorted({name for tree in of_year for name in tree.splits})
        years = ", ".join(tree.root.name for tree in trees)
        raise UsageError(
            f"{address} has no split {split!r}; ImageSets/Main of {years} has "
            f"{', '.join(known) or 'no lists'}."
        )
    return found


class VocSplit:
    """Images of one split of a VOC tree.

    names: the images' own ids; `ids` also name the year if the tree has several.
    """

    def __init__(self, trees: Sequence[VocTree], split: str, address: str) -> None:
        found = trees_of_split(trees, split, address)
        self._entries = [(tree, i) for tree, name in found for i in tree.image_ids(name)]
        # Ids of 2007 do not name their year, so ids of several years could collide.
        self.names = [image_id for _, image_id in self._entries]
        several = len(trees) > 1
        self.ids = [f"{tree.root.name}_{i}" if several else i for tree, i in self._entries]
        self.notes: list[str] = []

    def place(self, number: int) -> str:
        tree, image_id = self._entries[number]
        return str(tree.image_path(image_id))

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def labels(self, number: int) -> Labels:
        tree, image_id = self._entries[number]
        return tree.labels(image_id)
