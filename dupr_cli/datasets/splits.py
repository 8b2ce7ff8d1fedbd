"""Opens the splits of a labelled set of any layout, as images by number.

Each source (`voc`, `coco`, `yolo`, `cityscapes`, `shards`) gives images with their labels as its
files have them. labelled.py then brings them into one form (upright, inside the image).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED, open_shards
from dupr_cli.datasets.cityscapes import CityscapesSplit
from dupr_cli.datasets.coco import CocoSplit, coco_files
from dupr_cli.datasets.placement import Labels
from dupr_cli.datasets.shards import ShardSplit
from dupr_cli.datasets.voc import VocSplit, find_voc_trees
from dupr_cli.datasets.yolo import YoloSplit, is_yolo
from dupr_cli.errors import UsageError
from dupr_cli.metrics.types import Rle


class LabelSource(Protocol):
    """Images of a split, by number. `place` names an image in messages; notes: on the source as a
    whole, for the user."""

    ids: list[str]
    notes: list[str]

    def place(self, number: int) -> str: ...

    def image(self, number: int) -> BinaryIO: ...

    def labels(self, number: int) -> Labels:
        """Raises RunError when the labels are missing or damaged."""
        ...


class JoinedSource:
    """Several sources in sequence as one. An image that a source lists twice appears once."""

    def __init__(self, address: str, parts: dict[str, LabelSource]) -> None:
        """Raises UsageError when an image is in two of the sources."""
        self.ids, self.notes = list[str](), list[str]()
        self._entries: list[tuple[LabelSource, int]] = []
        seen: dict[str, str] = {}
        for split, part in parts.items():
            self.notes += part.notes
            twice = []
            for number, image_id in enumerate(part.ids):
                if image_id not in seen:
                    seen[image_id] = split
                    self.ids.append(image_id)
                    self._entries.append((part, number))
                elif seen[image_id] == split:
                    twice.append(image_id)
                else:
                    raise UsageError(
                        f"{address}: image {image_id} is in the split {split!r} and in "
                        f"{seen[image_id]!r}; join splits that share no image."
                    )
            if twice:
                self.notes.append(
                    f"{address}: the split {split!r} lists {len(twice)} images more than once; "
                    f"each counts once; the first is {twice[0]}"
                )

    def entry(self, number: int) -> tuple[LabelSource, int]:
        """The source of an image, and its number there."""
        return self._entries[number]

    def place(self, number: int) -> str:
        part, i = self._entries[number]
        return part.place(i)

    def image(self, number: int) -> BinaryIO:
        part, i = self._entries[number]
        return part.image(i)

    def labels(self, number: int) -> Labels:
        part, i = self._entries[number]
        return part.labels(i)

    def void(self, number: int) -> Rle | None:
        """The pixels that belong to no class, of sources that say so."""
        part, i = self._entries[number]
        return part.void(i) if isinstance(part, CityscapesSplit) else None

    @property
    def keypoint_flips(self) -> list[int] | None:
        """The number of each keypoint in a mirrored image, of sources that say so."""
        parts = (part for part, _ in self._entries if isinstance(part, YoloSplit))
        return next((part.keypoint_flips for part in parts), None)


def open_source(address: str, splits: Sequence[str], keypoints: bool = False) -> JoinedSource:
    """Open the splits of a labelled set, joined into one. keypoints: also read those that the set
    keeps in a file of their own.

    Raises UsageError when the set or a split does not exist, or an image is in two of the splits.
    """
    source = JoinedSource(
        address, {split: _open_split(address, split, keypoints) for split in splits}
    )
    if not source.ids:
        raise UsageError(f"{address}: the split {' + '.join(splits)!r} lists no images.")
    return source


def _open_split(address: str, split: str, keypoints: bool) -> LabelSource:
    path = Path(address)
    if any((path / name).exists() for name in (MANIFEST, UNFINISHED)):
        return ShardSplit(open_shards(address, split))
    trees = find_voc_trees(path)
    if trees:
        return VocSplit(trees, split, address)
    if (path / "leftImg8bit").is_dir():
        return CityscapesSplit(path, split)
    if coco_files(path) or (path.is_file() and path.suffix.lower() == ".json"):
        return CocoSplit(path, split, keypoints)
    if is_yolo(path):
        return YoloSplit(path, split)
    if not path.exists():
        raise UsageError(f"{address}: the folder does not exist.")
    # Shards without a manifest have no splits: training and testing would use the same images.
    raise UsageError(
        f"{address}: not a labelled set. Give a VOC tree (JPEGImages and Annotations, or XML "
        f"beside the images), COCO's layout (annotations/*.json beside folders of images), YOLO's "
        f"(data.yaml, or images and labels), Cityscapes (leftImg8bit and gtFine), or the shards "
        f"with a {MANIFEST} that `dupr prepare` makes from one of these."
    )
