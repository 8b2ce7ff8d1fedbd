"""The objects and detections of all images in single arrays, and the pairs that may overlap.

A metric that loops over images and classes spends its time in the loop. Here everything is sorted
once by (image, class); a detection's candidates are then a slice of the objects, and the overlaps
of all pairs are computed together, some hundred thousand at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dupr_cli.metrics.types import Detections, Flags, Floats, Integers, Truth

Scalar = TypeVar("Scalar", bound=np.generic)

# Pairs whose overlaps are computed at once: about as many as fit the cache of a core.
_PAIRS = 200_000
# Up to this many groups, a lookup table of all groups is small and faster than searching.
_TABLE = 4_000_000


@dataclass(frozen=True)
class ObjectArrays:
    """All objects, n. image: place of its image. ignored: difficult or crowd. size: COCO's area."""

    image: Integers
    label: Integers
    boxes: Floats
    ignored: Flags
    size: Floats

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class DetectionArrays:
    """All detections, d, in the order that decides between equal scores."""

    image: Integers
    label: Integers
    boxes: Floats
    scores: Floats

    def __len__(self) -> int:
        return len(self.label)

    def take(self, places: NDArray[np.integer] | Flags) -> DetectionArrays:
        return DetectionArrays(
            self.image[places], self.label[places], self.boxes[places], self.scores[places]
        )


def flatten_truths(truths: Sequence[Truth]) -> ObjectArrays:
    boxes = _joined([t.boxes for t in truths], np.float64, 4)
    ignored = [t.difficult if t.crowd is None else t.difficult | t.crowd for t in truths]
    sizes = box_areas(boxes)
    if any(t.areas is not None for t in truths):
        sizes = _joined(
            [box_areas(t.boxes) if t.areas is None else t.areas for t in truths], np.float64
        )
    return ObjectArrays(
        _image_numbers([len(t.labels) for t in truths]),
        _joined([t.labels for t in truths], np.int64),
        boxes,
        _joined(ignored, np.bool_),
        sizes,
    )


def flatten_detections(detections: Sequence[Detections]) -> DetectionArrays:
    """Concatenate image by image, or in the order of their file; see `Detections.order`."""
    found = DetectionArrays(
        _image_numbers([len(d.labels) for d in detections]),
        _joined([d.labels for d in detections], np.int64),
        _joined([d.boxes for d in detections], np.float64, 4),
        _joined([d.scores for d in detections], np.float64),
    )
    orders = [d.order for d in detections if d.order is not None]
    if len(orders) < len(detections):
        return found
    return found.take(np.argsort(_joined(orders, np.int64), kind="stable"))


def _image_numbers(counts: Sequence[int]) -> Integers:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _joined(
    parts: Sequence[NDArray[np.generic]], kind: type[Scalar], width: int = 0
) -> NDArray[Scalar]:
    shape = (0, width) if width else (0,)
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled).astype(kind) if filled else np.zeros(shape, dtype=kind)


def box_areas(boxes: NDArray[np.floating]) -> Floats:
    wide = boxes.astype(np.float64)
    areas: Floats = (wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])
    return areas


def pair_iou(boxes: Floats, others: Floats) -> Floats:
    """(p, 4) and (p, 4) pixel edges to (p,) intersection over union; 0 for boxes without area."""
    width = np.minimum(boxes[:, 2], others[:, 2]) - np.maximum(boxes[:, 0], others[:, 0])
    height = np.minimum(boxes[:, 3], others[:, 3]) - np.maximum(boxes[:, 1], others[:, 1])
    shared = np.clip(width, 0, None) * np.clip(height, 0, None)
    union = box_areas(boxes) + box_areas(others) - shared
    iou: Floats = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
    return iou


def _slices(groups: Integers, wanted: Integers) -> tuple[Integers, Integers]:
    """Where the members of each wanted group begin in the sorted `groups`, and how many."""
    number = 1 + int(max(groups.max(initial=0), wanted.max(initial=0)))
    if number > _TABLE:
        first = np.searchsorted(groups, wanted, "left")
        return first, np.searchsorted(groups, wanted, "right") - first
    sizes = np.bincount(groups, minlength=number)
    return (np.cumsum(sizes) - sizes)[wanted], sizes[wanted]


def candidate_pairs(
    groups: Integers, of_detection: Integers, of_object: Integers
) -> Iterator[tuple[Integers, Integers]]:
    """Pairs (detection, object) of the same group, in order of detections, then of objects.

    groups: the group of every object, sorted. of_detection: (d,) the group of each detection.
    of_object: (n,) the object that each entry of `groups` stands for.
    """
    first, counts = _slices(groups, of_detection)
    busy = np.flatnonzero(counts)
    ends = np.cumsum(counts[busy])
    start = 0
    while start < len(busy):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS, "right")))
        chunk = busy[start:stop]
        number = counts[chunk]
        detection = np.repeat(chunk, number)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(number) - number, number)
        yield detection, of_object[np.repeat(first[chunk], number) + within]
        start = stop
