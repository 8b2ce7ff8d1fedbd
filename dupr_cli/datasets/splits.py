"""Where the images of a labelled set lie: VOC trees, shards, COCO's JSON, Cityscapes.

Each source is some images by number, with their objects as their annotation has them; what is made
of that (upright, inside the image) is the same for all, in labelled.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED, ShardSet, open_shards
from dupr_cli.datasets.coco import coco_split, image_folder, image_folders, read_coco
from dupr_cli.datasets.voc import VocTree, find_voc_trees
from dupr_cli.errors import RunError, UsageError


class LabelSource(Protocol):
    """Images of a split, by number. `place` names an image in messages."""

    ids: list[str]

    def place(self, number: int) -> str: ...

    def image(self, number: int) -> BinaryIO: ...

    def boxes(self, number: int) -> Sequence[Box]: ...


class JoinedSource:
    """Several sources as one, one after the other."""

    def __init__(self, parts: Sequence[LabelSource]) -> None:
        self._entries = [(part, i) for part in parts for i in range(len(part.ids))]
        self.ids = [image_id for part in parts for image_id in part.ids]

    def place(self, number: int) -> str:
        part, i = self._entries[number]
        return part.place(i)

    def image(self, number: int) -> BinaryIO:
        part, i = self._entries[number]
        return part.image(i)

    def boxes(self, number: int) -> Sequence[Box]:
        part, i = self._entries[number]
        return part.boxes(i)


class VocSource:
    """Images of one split of a VOC tree: `trainval` of every year, or `2007/trainval` of one.

    names: the images' own ids; `ids` name the year too where the tree has several.
    """

    def __init__(self, trees: Sequence[VocTree], split: str, address: str) -> None:
        year, _, name = split.rpartition("/")
        of_year = [tree for tree in trees if not year or tree.root.name.endswith(year)]
        with_split = [tree for tree in of_year if name in tree.splits]
        if not with_split:
            known = sorted({name for tree in of_year for name in tree.splits})
            years = ", ".join(tree.root.name for tree in trees)
            raise UsageError(
                f"{address}: there is no split {split!r}; ImageSets/Main of {years} has "
                f"{', '.join(known) or 'no lists'}."
            )
        self._entries = [(tree, i) for tree in with_split for i in tree.image_ids(name)]
        # Ids of 2007 do not name their year: those of several years must not meet.
        self.names = [image_id for _, image_id in self._entries]
        several = len(trees) > 1
        self.ids = [f"{tree.root.name}_{i}" if several else i for tree, i in self._entries]

    def place(self, number: int) -> str:
        tree, image_id = self._entries[number]
        return str(tree.image_path(image_id))

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def boxes(self, number: int) -> Sequence[Box]:
        tree, image_id = self._entries[number]
        return tree.boxes(image_id)


class ShardSource:
    """Samples of one split of shards."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self.ids = list(shards.keys())

    def place(self, number: int) -> str:
        shard, _ = self._shards.place(number)
        return f"{self._shards.shards[shard]}: sample {self.ids[number]}"

    def image(self, number: int) -> BinaryIO:
        return io.BytesIO(self._shards[number].image)

    def boxes(self, number: int) -> Sequence[Box]:
        boxes = self._shards[number].boxes
        if boxes is None:
            raise UsageError(
                f"{self.place(number)} has no boxes (no {self.ids[number]}.boxes.json). A labelled "
                f"set is needed: a VOC tree, or the shards that `dupr prepare` makes of one."
            )
        return boxes


class CocoSource:
    """Images of one JSON of COCO: `train2017` is annotations/instances_train2017.json.

    `train` is too, where no other file of annotations/ is of a train split. Images go by their file
    names: ids begin anew in every file of many tools.
    """

    def __init__(self, root: Path, split: str) -> None:
        file = coco_split_file(root, split)
        coco = read_coco(file)
        places = [root / split, *image_folders(file)]
        folder = image_folder(coco, places)
        if folder is None:
            looked = ", ".join(str(place) for place in dict.fromkeys(places))
            raise UsageError(
                f"{file}: its first image, {coco.images[0].file_name}, is in none of {looked}. "
                f"Put the images there."
            )
        self._folder, self._images = folder, coco.images
        self.ids = [image.file_name for image in coco.images]

    def place(self, number: int) -> str:
        return str(self._folder / self._images[number].file_name)

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def boxes(self, number: int) -> Sequence[Box]:
        return self._images[number].objects


def coco_annotations(root: Path) -> list[Path]:
    """Files of annotations/ that can be a split: COCO's keypoints and captions are none."""
    files = sorted((root / "annotations").glob("*.json"))
    return [file for file in files if not file.stem.startswith(("person_keypoints_", "captions_"))]


def coco_split_file(root: Path, split: str) -> Path:
    """The JSON of a split: `train2017`, or `train` where no other file is of a train split.

    Raises UsageError for an unknown split, or one that several files could be.
    """
    annotations = coco_annotations(root)
    files = [f for f in annotations if split in (f.stem, f.stem.removeprefix("instances_"))]
    files = files or [file for file in annotations if coco_split(file) == split]
    if len(files) != 1:
        known = ", ".join(file.stem.removeprefix("instances_") for file in annotations)
        raise UsageError(
            f"{root}: there is no split {split!r} (annotations/instances_{split}.json or "
            f"annotations/{split}.json); annotations/ has {known}."
        )
    return files[0]


# Ids of the classes that have instances. Source: cityscapesScripts, helpers/labels.py.
_CITYSCAPES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip


class CityscapesSource:
    """Images of one split of Cityscapes, with the instances that its *_instanceIds.png draw.

    A pixel of instance n of class c is 1000 c + n; a pixel of c alone is of a group that was not
    told apart, and becomes a crowd.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not self._images:
            known = sorted(p.name for p in (root / "leftImg8bit").iterdir() if p.is_dir())
            raise UsageError(
                f"{root}: there are no images of a split {split!r} in leftImg8bit; it has "
                f"{', '.join(known) or 'no folders'}."
            )
        self._labels = root / "gtFine" / split
        self.ids = [path.name.removesuffix("_leftImg8bit.png") for path in self._images]

    def place(self, number: int) -> str:
        return str(self._images[number])

    def image(self, number: int) -> BinaryIO:
        return self._images[number].open("rb")

    def boxes(self, number: int) -> Sequence[Box]:
        city = self._images[number].parent.name
        path = self._labels / city / f"{self.ids[number]}_gtFine_instanceIds.png"
        try:
            with Image.open(path) as image:
                drawn = np.asarray(image)
        except FileNotFoundError:
            raise RunError(f"{path}: the annotation is missing.") from None
        except (OSError, ValueError, SyntaxError) as error:
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
        return boxes


def open_source(address: str, splits: Sequence[str]) -> LabelSource:
    """The splits of a labelled set, joined.

    Raises UsageError when there is no such set or split, or an image is in the set twice.
    """
    parts = [_open_split(address, split) for split in splits]
    source = parts[0] if len(parts) == 1 else JoinedSource(parts)
    named = " + ".join(splits)
    if not source.ids:
        raise UsageError(f"{address}: the split {named!r} lists no images.")
    seen: set[str] = set()
    for image_id in source.ids:
        if image_id in seen:
            raise UsageError(f"{address}: the split {named!r} lists image {image_id} twice.")
        seen.add(image_id)
    return source


def _open_split(address: str, split: str) -> LabelSource:
    path = Path(address)
    trees = find_voc_trees(path)
    if trees:
        return VocSource(trees, split, address)
    if any((path / name).exists() for name in (MANIFEST, UNFINISHED)):
        return ShardSource(open_shards(address, split))
    if (path / "leftImg8bit").is_dir():
        return CityscapesSource(path, split)
    if coco_annotations(path):
        return CocoSource(path, split)
    if not path.exists():
        raise UsageError(f"{address}: there is no such folder.")
    # Shards without a manifest have no splits: training and testing would use the same images.
    raise UsageError(
        f"{address}: not a labelled set. A VOC tree is needed (JPEGImages, Annotations, "
        f"ImageSets/Main, in it or in its VOC* folders), COCO's layout (annotations/*.json beside "
        f"folders of images), Cityscapes (leftImg8bit and gtFine), or the shards with a {MANIFEST} "
        f"that `dupr prepare` makes of one."
    )
