"""Sets with a semantic mask for every image: VOC's, Cityscapes', plain folders, and shards.

    JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/<split>.txt       (VOC)
    leftImg8bit/<split>/<city>/<id>_leftImg8bit.png  gtFine/.../<id>_gtFine_labelIds.png
    images/[<split>/]<id>.jpg   masks/[<split>/]<id>.png   classes.txt                      (plain)
    <split>/images/<id>.jpg     <split>/masks/<id>.png     classes.txt

Images of a plain folder without splits are those of train.
VOC's split train_aug takes its masks from SegmentationClassAug, where that exists. Masks are placed
on the upright image like all other labels (`placement.placed_mask`).
Sources: the VOC development kit; cityscapesScripts, helpers/labels.py; Hariharan et al. 2011
(train_aug).
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np

from dupr_cli.artifacts.files import is_present
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.results import DatasetIdentity
from dupr_cli.artifacts.shard_files import MASK, MASK_CLASSES
from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED, ShardSet, open_shards
from dupr_cli.datasets.cityscapes import CityscapesSplit
from dupr_cli.datasets.labelled import (
    Annotation,
    LabelledSet,
    opened_image,
    require_range,
)
from dupr_cli.datasets.layout import SPLITS, split_folders, walk
from dupr_cli.datasets.masks import Mask, read_mask, require_classes
from dupr_cli.datasets.placement import Labels, placed_mask, summarise_notes
from dupr_cli.datasets.shards import ShardSplit, kept_format, require_format
from dupr_cli.datasets.splits import JoinedSource, LabelSource
from dupr_cli.datasets.text import read_text
from dupr_cli.errors import RunError, UsageError
from dupr_cli.metrics.semantic import IGNORE
from dupr_cli.metrics.types import Integers
from dupr_cli.progress import Reporter

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
# Number of each class in a labelIds mask; the other 16 of 0 to 33 do not count.
CITYSCAPES_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
_CITYSCAPES_NUMBERS = 34
CLASSES_FILE = "classes.txt"
_LISTS = Path("ImageSets", "Segmentation")
_AUGMENTED = ("train_aug", "trainaug")
_IMAGES, _MASKS = "images", "masks"


class MaskSource(LabelSource, Protocol):
    """A source whose images have masks. classes: names by number, or empty if they are not known.

    mask_place: names a mask in messages.
    """

    classes: list[str]

    def mask_place(self, number: int) -> str: ...

    def mask(self, number: int) -> Mask:
        """As the mask is stored, with the numbers of `classes`. Raises RunError."""
        ...


class _WithoutObjects:
    """A source without boxes."""

    def labels(self, number: int) -> Labels:
        return Labels()


class VocMasks(_WithoutObjects):
    """Images of one split of ImageSets/Segmentation, of all years of a VOC tree or of one."""

    def __init__(self, trees: Sequence[Path], split: str, address: str) -> None:
        """Raises UsageError when no tree has the split."""
        self.classes, self.notes = list(VOC_CLASSES), list[str]()
        year, _, name = split.rpartition("/")
        of_year = [tree for tree in trees if not year or tree.name.endswith(year)]
        found = [tree for tree in of_year if (tree / _LISTS / f"{name}.txt").is_file()]
        if not found:
            known = sorted(
                {file.stem for tree in of_year for file in (tree / _LISTS).glob("*.txt")}
            )
            raise UsageError(
                f"{address} has no split {split!r} of masks; ImageSets/Segmentation has "
                f"{', '.join(known) or 'no lists'}."
            )
        self._entries: list[tuple[Path, str]] = []
        for tree in found:
            for line in read_text(tree / _LISTS / f"{name}.txt").splitlines():
                if line.strip():
                    # Lists of train_aug may name the paths of the image and of its mask.
                    self._entries.append((tree, Path(line.split()[0]).stem))
        several = len(trees) > 1
        self.ids = [f"{tree.name}_{i}" if several else i for tree, i in self._entries]
        self._folders = ["SegmentationClass"]
        if name in _AUGMENTED:
            self._folders.insert(0, "SegmentationClassAug")

    def place(self, number: int) -> str:
        tree, image_id = self._entries[number]
        path = tree / "JPEGImages" / f"{image_id}.jpg"
        png = path.with_suffix(".png")
        return str(png if is_present(png) and not is_present(path) else path)

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def mask_place(self, number: int) -> str:
        tree, image_id = self._entries[number]
        paths = [tree / folder / f"{image_id}.png" for folder in self._folders]
        return str(next((path for path in paths if is_present(path)), paths[-1]))

    def mask(self, number: int) -> Mask:
        place = self.mask_place(number)
        mask = read_mask(Path(place), place)
        require_classes(mask, len(self.classes), place)
        return mask


class CityscapesMasks(CityscapesSplit):
    """Images of one split of Cityscapes, with the 19 classes that are measured."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split)
        self.classes = list(CITYSCAPES_IDS)
        self._numbers = np.full(256, IGNORE, dtype=np.uint8)
        self._numbers[list(CITYSCAPES_IDS.values())] = range(len(CITYSCAPES_IDS))

    def mask_place(self, number: int) -> str:
        return str(self.annotation(number, "labelIds"))

    def mask(self, number: int) -> Mask:
        place = self.mask_place(number)
        ids = read_mask(Path(place), place)
        # A licence plate has the id -1, which tools write as 255.
        require_classes(ids, _CITYSCAPES_NUMBERS, place)
        return self._numbers[ids]


class FolderMasks(_WithoutObjects):
    """One split of a plain folder: images and masks with the same stems."""

    def __init__(self, root: Path, split: str) -> None:
        """Raises UsageError when the folder has no such split, or no image in it."""
        images, masks = _split_of(root, split)
        self.notes = list[str]()
        self._images = [images / name for name in walk(images)]
        if not self._images:
            raise UsageError(f"{images}: the folder has no images.")
        stems = [path.relative_to(images).with_suffix("").as_posix() for path in self._images]
        twice = sorted(stem for stem, count in Counter(stems).items() if count > 1)
        if twice:
            raise UsageError(
                f"{images}: {len(twice)} stems belong to several images, which would share one "
                f"mask; the first is {twice[0]}. Rename one of them."
            )
        self.ids, self._masks = stems, [masks / f"{stem}.png" for stem in stems]
        unused = {masks / name for name in walk(masks)} - set(self._masks)
        if unused:
            self.notes.append(
                f"{masks}: {len(unused)} files belong to no image, or are not PNG, and were left "
                f"out; the first is {min(unused).name}"
            )
        self.classes = _class_names(root)

    def place(self, number: int) -> str:
        return str(self._images[number])

    def image(self, number: int) -> BinaryIO:
        return self._images[number].open("rb")

    def mask_place(self, number: int) -> str:
        return str(self._masks[number])

    def mask(self, number: int) -> Mask:
        place = self.mask_place(number)
        mask = read_mask(self._masks[number], place)
        require_classes(mask, len(self.classes) or IGNORE, place)
        return mask


class ShardMasks(_WithoutObjects):
    """Samples of one split of shards that `dupr prepare` made from a set with masks."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = ShardSplit(shards)
        self.ids, self.notes, self._samples = self._shards.ids, list[str](), shards
        named = shards.described(0).info.get(MASK_CLASSES) if len(shards) else None
        self.classes = [str(name) for name in named] if isinstance(named, list) else []

    def place(self, number: int) -> str:
        return self._shards.place(number)

    def image(self, number: int) -> BinaryIO:
        return self._shards.image(number)

    def mask_place(self, number: int) -> str:
        return f"{self.place(number)}.{MASK}"

    def mask(self, number: int) -> Mask:
        sample, place = self._samples.described(number), self.mask_place(number)
        if MASK not in sample.extras:
            raise RunError(
                f"{place}: the sample has no mask. Give a set with masks, or the shards that "
                f"`dupr prepare SET --set source.kind=masks` makes from one."
            )
        mask = read_mask(io.BytesIO(sample.extras[MASK]), place)
        require_classes(mask, len(self.classes) or IGNORE, place)
        return mask


def _split_of(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and masks of a split. Raises UsageError when there is none."""
    places = [(root / _IMAGES / split, root / _MASKS / split)]
    places.append((root / split / _IMAGES, root / split / _MASKS))
    inner = [folder.name for folder in split_folders(root / _IMAGES)]
    outer = [folder.name for folder in split_folders(root) if (folder / _IMAGES).is_dir()]
    if not inner and (root / _IMAGES).is_dir() and split == "train":
        places.append((root / _IMAGES, root / _MASKS))
    for images, masks in places:
        if images.is_dir():
            if not masks.is_dir():
                raise UsageError(f"{masks}: the folder of masks for {images} does not exist.")
            return images, masks
    known = sorted({*inner, *outer}) or ["train"]
    advice = "" if len(known) > 1 else " --set data.validation=0.3 tests on a part of one split."
    raise UsageError(f"{root} has no split {split!r}; its splits are {', '.join(known)}.{advice}")


def holds_masks(path: Path) -> bool:
    """Whether a folder is Cityscapes, or a plain one with images and masks."""
    if (path / "leftImg8bit").is_dir():
        return (path / "gtFine").is_dir()
    places = (path, *split_folders(path))
    return any((of / _IMAGES).is_dir() and (of / _MASKS).is_dir() for of in places)


def mask_splits(path: Path) -> list[str]:
    """The splits of a set with masks: train, val and test, or else all of VOC's lists."""
    trees = _voc_trees(path)
    if trees:
        known = {file.stem for tree in trees for file in (tree / _LISTS).glob("*.txt")}
        return [split for split in SPLITS if split in known] or sorted(known)
    folders = {"gtFine": path / "gtFine", _IMAGES: path / _IMAGES, "": path}
    for folder in folders.values():
        found = [of.name for of in split_folders(folder)]
        if found:
            return found
    return ["train"]


def _class_names(root: Path) -> list[str]:
    """The lines of classes.txt; empty without the file. Raises UsageError for names given twice."""
    file = root / CLASSES_FILE
    if not file.is_file():
        return []
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names) or len(names) > IGNORE:
        raise UsageError(
            f"{file}: {len(names)} names, of which {len(set(names))} differ; give each class of "
            f"the masks one line, in the order of their numbers from 0, at most {IGNORE}."
        )
    return names


def open_masks(address: str, splits: Sequence[str]) -> JoinedMasks:
    """Open the splits of a set with masks, joined into one.

    Raises UsageError as `splits.open_source` does.
    """
    parts = {split: _open_split(address, split) for split in splits}
    source = JoinedMasks(address, parts)
    if not source.ids:
        raise UsageError(f"{address}: the split {' + '.join(splits)!r} lists no images.")
    return source


class JoinedMasks(JoinedSource):
    """Several sources with masks in sequence as one."""

    def __init__(self, address: str, parts: dict[str, MaskSource]) -> None:
        super().__init__(address, dict(parts))
        self.classes = next(iter(parts.values())).classes

    def mask_place(self, number: int) -> str:
        part, i = self.entry(number)
        return cast(MaskSource, part).mask_place(i)

    def mask(self, number: int) -> Mask:
        part, i = self.entry(number)
        return cast(MaskSource, part).mask(i)


def _open_split(address: str, split: str) -> MaskSource:
    path = Path(address)
    if any((path / name).exists() for name in (MANIFEST, UNFINISHED)):
        return ShardMasks(open_shards(address, split))
    trees = _voc_trees(path)
    if trees:
        return VocMasks(trees, split, address)
    if (path / "leftImg8bit").is_dir():
        return CityscapesMasks(path, split)
    if any((folder / _IMAGES).is_dir() for folder in (path, *split_folders(path))):
        return FolderMasks(path, split)
    if not path.exists():
        raise UsageError(f"{address}: the folder does not exist.")
    raise UsageError(
        f"{address}: not a set with semantic masks. Give a VOC tree with ImageSets/Segmentation, "
        f"Cityscapes (leftImg8bit and gtFine), a folder with images and masks "
        f"({_IMAGES}/train/a.jpg and {_MASKS}/train/a.png), or the shards with a {MANIFEST} that "
        f"`dupr prepare` makes from one of these."
    )


def _voc_trees(path: Path) -> list[Path]:
    """The years of a VOC tree that have lists of masks: the path itself, or folders in it."""
    if (path / _LISTS).is_dir():
        return [path]
    for parent in (path, path / "VOCdevkit"):
        found = sorted(folder for folder in parent.glob("*") if (folder / _LISTS).is_dir())
        if found:
            return found
    return []


@dataclass(frozen=True)
class SemanticSet(LabelledSet):
    """`LabelledSet` whose images have masks. The names of an annotation are the classes that its
    mask shows, with their pixels as areas; it has no boxes."""

    names: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names by number, whether masks show them or not."""
        return list(self.names)

    @property
    def identity(self) -> DatasetIdentity:
        return replace(super().identity, objects=0)

    def mask(self, position: int) -> Mask:
        """(height, width) class numbers of the upright image, IGNORE where nothing is labelled."""
        source, number = cast(MaskSource, self._source), self._numbers[position]
        with opened_image(source, number, self.pixels) as (picture, _):
            stored, orientation = picture.stored, picture.orientation
        return placed_mask(source.mask(number), stored, orientation)


def open_semantic(
    address: str,
    splits: Sequence[str],
    reporter: Reporter,
    *,
    pixels: PixelFormat | None = None,
) -> SemanticSet:
    """Open splits of a set with masks, joined into one, and read every mask.

    Images and masks that cannot be used are left out, counted, and the first is named.
    Raises UsageError when the set or split does not exist, or none of its images can be used.
    """
    require_format(address, kept_format(address), pixels, reporter)
    source = open_masks(address, splits)
    annotations, sizes, numbers = list[Annotation](), list[int](), list[int]()
    errors, counts, notes = list[RunError](), list[Integers](), list[tuple[str, str]]()
    named = " + ".join(splits)
    with reporter.task(f"read {named}", len(source.ids), "images") as task:
        for number, image_id in enumerate(source.ids):
            try:
                found, annotation, size, note = _read(source, number, image_id, pixels)
            except RunError as error:
                errors.append(error)
                continue
            counts.append(found)
            notes += [(image_id, note)] if note else []
            annotations.append(annotation)
            sizes.append(size)
            numbers.append(number)
            task.advance()
    where = f"{address}, split {named}"
    if not annotations:
        raise UsageError(f"{where}: no image can be used; the first of {len(errors)}: {errors[0]}")
    for warning in (*source.notes, *(f"{where}: {text}" for text in summarise_notes(notes))):
        reporter.warning(warning)
    if errors:
        reporter.warning(
            f"{where}: {len(errors)} of {len(source.ids)} images were left out; the first: "
            f"{errors[0]}"
        )
    highest = max(int(of.nonzero()[0].max(initial=0)) for of in counts)
    names = tuple(source.classes or (f"class {number}" for number in range(highest + 1)))
    shown = tuple(_with_names(a, of, names) for a, of in zip(annotations, counts, strict=True))
    return SemanticSet(
        address, named, shown, tuple(sizes), source, tuple(numbers), pixels, names=names
    )


def _read(
    source: MaskSource, number: int, image_id: str, pixels: PixelFormat | None
) -> tuple[Integers, Annotation, int, str]:
    """Pixels of each class number, the annotation without its names, the file's size in bytes, and
    a note if it is in doubt how the mask lies. Raises RunError."""
    with opened_image(source, number, pixels) as (picture, size):
        require_range(picture, pixels)
        stored, orientation, upright = picture.stored, picture.orientation, picture.upright
    mask = source.mask(number)
    try:
        mask = placed_mask(mask, stored, orientation)
    except RunError as error:
        raise RunError(f"{source.mask_place(number)}: {error}.") from error
    counts = np.bincount(mask.reshape(-1), minlength=IGNORE + 1)[:IGNORE]
    annotation = Annotation(
        image_id,
        *upright,
        boxes=np.zeros((0, 4), dtype=np.float32),
        names=(),
        difficult=np.zeros(0, dtype=np.bool_),
        crowd=np.zeros(0, dtype=np.bool_),
        areas=np.zeros(0, dtype=np.float64),
        mask_sha256=hashlib.sha256(mask.tobytes()).hexdigest(),
    )
    note = ""
    if orientation != 1 and upright == stored:
        note = (
            f"orientation in doubt: EXIF orientation {orientation}, and the mask's size does not "
            f"show whether it was drawn on the upright image; it is taken as drawn on the stored "
            f"one"
        )
    return counts, annotation, size, note


def _with_names(annotation: Annotation, counts: Integers, names: Sequence[str]) -> Annotation:
    """The annotation with the classes that its mask shows. counts: pixels by number."""
    shown = np.flatnonzero(counts).tolist()
    flags = np.zeros(len(shown), dtype=np.bool_)
    return replace(
        annotation,
        names=tuple(names[number] for number in shown),
        difficult=flags,
        crowd=flags,
        areas=counts[shown].astype(np.float64),
    )
