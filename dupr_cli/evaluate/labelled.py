"""Labelled sets: images with boxes from a VOC tree or from dupr's shards, seen the same way.

Opening a set reads every annotation and image header once, so that what is wrong with the data is
said before any training: missing files, boxes without area, classes. Pixels are decoded later, one
image at a time. Images and boxes are upright (EXIF orientation applied, as `dupr prepare` does),
boxes are pixel edges, 0-based and half-open, inside the image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dupr_cli.artifacts.labels import Box, Placement
from dupr_cli.artifacts.results import DatasetIdentity, image_ids_digest
from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED, ShardSet, open_shards
from dupr_cli.artifacts.voc_tree import VocTree, find_voc_trees
from dupr_cli.errors import RunError, UsageError
from dupr_cli.evaluate.metrics import Truth
from dupr_cli.progress import Reporter

_ORIENTATION = 274  # EXIF tag


@dataclass(frozen=True)
class Annotation:
    """What is known about one image without its pixels.

    width, height: of the upright image, pixels. boxes: (n, 4) float32, x_min, y_min, x_max, y_max.
    names: class of each box. difficult: (n,) bool; crowd regions count as difficult.
    """

    image_id: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    names: tuple[str, ...]
    difficult: NDArray[np.bool_]


class _Source(Protocol):
    """Where the images of one split lie, by number. `place` names an image in messages."""

    ids: list[str]

    def place(self, number: int) -> str: ...

    def image(self, number: int) -> BinaryIO: ...

    def boxes(self, number: int) -> Sequence[Box]: ...


class _VocSource:
    """Images of one split of a VOC tree, one year after the other."""

    def __init__(self, trees: Sequence[VocTree], split: str, address: str) -> None:
        with_split = [tree for tree in trees if split in tree.splits]
        if not with_split:
            known = sorted({name for tree in trees for name in tree.splits})
            raise UsageError(
                f"{address}: there is no split {split!r}; ImageSets/Main has "
                f"{', '.join(known) or 'no lists'}."
            )
        self._entries = [(tree, i) for tree in with_split for i in tree.image_ids(split)]
        # Ids of 2007 do not name their year: those of several years must not meet.
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


class _ShardSource:
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


@dataclass(frozen=True)
class LabelledSet:
    """One split of a labelled set, or some images of it.

    annotations: in the order of the split. bytes: size of each image file.
    """

    address: str
    split: str
    annotations: tuple[Annotation, ...]
    bytes: tuple[int, ...]
    _source: _Source
    _numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def ids(self) -> list[str]:
        return [annotation.image_id for annotation in self.annotations]

    @property
    def classes(self) -> list[str]:
        """Names of all objects, sorted."""
        return sorted({name for annotation in self.annotations for name in annotation.names})

    @property
    def digest(self) -> str:
        """sha256 over image ids, file sizes, boxes and classes: what training and AP hang on."""
        digest = hashlib.sha256()
        for annotation, size in zip(self.annotations, self.bytes, strict=True):
            digest.update(f"{annotation.image_id} {size} {annotation.names}\n".encode())
            digest.update(annotation.boxes.tobytes() + annotation.difficult.tobytes())
        return digest.hexdigest()

    @property
    def identity(self) -> DatasetIdentity:
        return DatasetIdentity(
            address=self.address,
            split=self.split,
            images=len(self),
            objects=sum(len(annotation.names) for annotation in self.annotations),
            image_ids_sha256=image_ids_digest(self.ids),
        )

    def subset(self, positions: Sequence[int]) -> LabelledSet:
        """The images at these positions, in the order given."""
        return dataclasses.replace(
            self,
            annotations=tuple(self.annotations[i] for i in positions),
            bytes=tuple(self.bytes[i] for i in positions),
            _numbers=tuple(self._numbers[i] for i in positions),
        )

    def image(self, position: int) -> Image.Image:
        """Upright RGB image. Raises RunError naming it when it cannot be read or decoded."""
        with _opened(self._source, self._numbers[position]) as (image, _):
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")

    def truth(self, position: int, classes: Sequence[str]) -> Truth:
        """Objects of an image as the metric wants them; `classes` gives the numbers."""
        annotation = self.annotations[position]
        labels = np.array([classes.index(name) for name in annotation.names], dtype=np.int64)
        return Truth(annotation.boxes, labels, annotation.difficult)


@contextmanager
def _opened(source: _Source, number: int) -> Iterator[tuple[Image.Image, int]]:
    """An image whose pixels are not decoded yet, and the size of its file in bytes."""
    try:
        with source.image(number) as file, Image.open(file) as image:
            yield image, file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise RunError(
            f"{source.place(number)}: the image is missing, but the split lists it. Put it there, "
            f"or take it off the list."
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(
            f"{source.place(number)}: the image cannot be decoded ({error}). Replace it, or take "
            f"it out of the set."
        ) from error


def open_labelled(address: str, split: str, reporter: Reporter) -> LabelledSet:
    """One split of a VOC tree (a VOCdevkit or one year's folder) or of shards with boxes.

    Boxes are clipped to the image, those left without area are dropped; both are reported.
    Raises UsageError when there is no such set or split, it has no images or no boxes, and
    RunError naming the file when an image or annotation is missing or damaged.
    """
    source = _open_source(address, split)
    if not source.ids:
        raise UsageError(f"{address}: the split {split!r} lists no images.")
    if len(set(source.ids)) < len(source.ids):
        twice = next(i for n, i in enumerate(source.ids) if i in source.ids[:n])
        raise UsageError(f"{address}: the split {split!r} lists image {twice} twice.")
    annotations, sizes = [], []
    clipped: list[str] = []
    dropped: list[str] = []
    for number, image_id in enumerate(source.ids):
        boxes = source.boxes(number)
        if not all(box.name for box in boxes):
            raise RunError(
                f"{address}: image {image_id}: an object has no class name; give it one."
            )
        with _opened(source, number) as (image, size):
            stored = image.size
            orientation = image.getexif().get(_ORIENTATION, 1)
        annotation = _annotate(image_id, boxes, stored, orientation, clipped, dropped)
        annotations.append(annotation)
        sizes.append(size)
    for images, what in (
        (clipped, "reached out of the image and were cut at its edge"),
        (dropped, "had no area inside the image and were dropped"),
    ):
        if images:
            reporter.warning(
                f"{address}, split {split}: {len(images)} boxes {what}; the first is in "
                f"{images[0]}."
            )
    return LabelledSet(
        address, split, tuple(annotations), tuple(sizes), source, tuple(range(len(sizes)))
    )


def _open_source(address: str, split: str) -> _Source:
    path = Path(address)
    trees = find_voc_trees(path)
    if trees:
        return _VocSource(trees, split, address)
    if any((path / name).exists() for name in (MANIFEST, UNFINISHED)):
        return _ShardSource(open_shards(address, split))
    if not path.exists():
        raise UsageError(f"{address}: there is no such folder.")
    # Shards without a manifest have no splits: training and testing would use the same images.
    raise UsageError(
        f"{address}: not a labelled set. A VOC tree is needed (JPEGImages, Annotations, "
        f"ImageSets/Main, in it or in its VOC* folders), or the shards with a {MANIFEST} that "
        f"`dupr prepare` makes of one."
    )


def _annotate(
    image_id: str,
    boxes: Sequence[Box],
    stored: tuple[int, int],
    orientation: int,
    clipped: list[str],
    dropped: list[str],
) -> Annotation:
    """Boxes of the stored image, upright and inside the image.

    clipped, dropped: get the image's id for every box that was changed or left out.
    """
    upright = Placement.upright(orientation, *stored)
    turned = [upright.box(box).corners for box in boxes]
    corners = np.array(turned, dtype=np.float64).reshape(-1, 4)
    width, height = stored[::-1] if orientation >= 5 else stored
    inside = corners.clip(0, [width, height, width, height])
    has_area = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    clipped += [image_id] * int(np.count_nonzero((inside != corners).any(axis=1) & has_area))
    dropped += [image_id] * int(np.count_nonzero(~has_area))
    kept = [box for box, keep in zip(boxes, has_area, strict=True) if keep]
    return Annotation(
        image_id,
        width,
        height,
        inside[has_area].astype(np.float32),
        tuple(box.name for box in kept),
        np.array([box.difficult or box.crowd for box in kept], dtype=np.bool_),
    )
