"""VOC's average precision, as the development kit defines it and MoCo's transfer tables report it.

Its input is the detections and ground truth of a test set, its output AP per class and IoU
threshold. The overlap with an image's objects is computed once; every threshold then compares the
same numbers, over all images and classes together (see arrays.py).

Boxes are pixel edges, 0-based and half-open (`artifacts.labels`). The kit counts inclusive
pixels, xmin = x_min + 1 and xmax = x_max, so its width xmax - xmin + 1 is x_max - x_min here, and
the same holds for intersections: plain IoU of the edges is the kit's IoU with its +1.

Source: the VOC 2007 and 2010 development kits, VOCevaldet. The mean over IoU 0.50:0.05:0.95 and the
rule that IoU must exceed the threshold are detectron2's (the kit's own code has >=). Scores are
used as they are, without rounding to three decimals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dupr_cli.metrics.arrays import (
    DetectionArrays,
    ObjectArrays,
    candidate_pairs,
    flatten_detections,
    flatten_truths,
    pair_iou,
)
from dupr_cli.metrics.types import (
    Detections,
    Flags,
    Floats,
    Integers,
    Points,
    Scores,
    Truth,
    threshold_name,
)

# Whole percents over 100: 55 / 100 differs from the 0.55 that adding up 0.05 arrives at.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
# The range as MATLAB and numpy build it: its 0.3 is 0.30000000000000004, and that moves an AP.
RECALL_THRESHOLDS = np.arange(0, 1.1, 0.1)


@dataclass(frozen=True)
class Matches:
    """Detections sorted by class, then highest score first, each with the object it overlaps most.

    label, scores: (d,). iou: (d,) 0 if the image has no object of the class. object: (d,) its
    number, -1 without one. ignored: (d,) whether that object is difficult or crowd. starts:
    (classes + 1,) where the detections of each class begin. positives: (classes,) objects to find.
    place: (d,) positions of the detections before sorting.
    """

    label: Integers
    scores: Floats
    iou: Floats
    object: Integers
    ignored: Flags
    starts: Integers
    positives: Integers
    place: Integers
    objects: int


@dataclass(frozen=True)
class Outcome:
    """The verdicts on the detections of `Matches` at one IoU threshold, each (d,) bool.

    right: the first on its object. ignored: on an ignored object. All others are wrong.
    """

    right: Flags
    ignored: Flags


def match(objects: ObjectArrays, found: DetectionArrays, classes: int) -> Matches:
    """Pair each detection with the object of its image and class that it overlaps most, whether
    taken or not; among equal overlaps, with the first."""
    iou, best = _best_overlaps(objects, found, classes)
    order, starts = _sorted_by_class(found, classes)
    label = found.label[order]
    ignored = np.zeros(len(found), dtype=np.bool_)
    ignored[best >= 0] = objects.ignored[best[best >= 0]]
    return Matches(
        label,
        found.scores[order],
        iou[order],
        best[order],
        ignored[order],
        starts,
        np.bincount(objects.label[~objects.ignored], minlength=classes),
        order,
        len(objects),
    )


def _sorted_by_class(found: DetectionArrays, classes: int) -> tuple[Integers, Integers]:
    """(d,) places of the detections by class, then highest score first; where each class begins.

    The sort is stable: detections of equal score keep their order.
    """
    small = np.uint16 if classes <= np.iinfo(np.uint16).max else np.int64  # radix-sorted
    order = np.argsort(found.label.astype(small), kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(found.label, minlength=classes))])
    for start, end in pairwise(starts.tolist()):
        of_class = order[start:end]
        order[start:end] = of_class[_falling(found.scores[of_class])]
    return order, starts


def _falling(scores: Floats) -> Integers:
    """(d,) places, highest score first; equal scores keep their order."""
    order = np.argsort(-scores)
    ranked = scores[order]
    # numpy's stable sort is several times slower, and only equal scores need it.
    if (ranked[1:] == ranked[:-1]).any():
        return np.argsort(-scores, kind="stable")
    return order


def _best_overlaps(
    objects: ObjectArrays, found: DetectionArrays, classes: int
) -> tuple[Floats, Integers]:
    iou, best = np.zeros(len(found)), np.full(len(found), -1)
    keys = objects.image * classes + objects.label
    by_key = np.argsort(keys, kind="stable")
    groups = found.image * classes + found.label
    for detection, candidate in candidate_pairs(keys[by_key], groups, by_key):
        overlaps = pair_iou(found.boxes[detection], objects.boxes[candidate])
        firsts = np.flatnonzero(np.diff(detection, prepend=-1))
        which = detection[firsts]
        iou[which] = np.maximum.reduceat(overlaps, firsts)
        largest = np.flatnonzero(overlaps == iou[detection])
        # Writing from the last to the first keeps the first of equally large overlaps.
        best[detection[largest[::-1]]] = candidate[largest[::-1]]
    return iou, best


def outcome(matches: Matches, threshold: float) -> Outcome:
    """Right, wrong or ignored, for IoU above a threshold."""
    hit = matches.iou > threshold
    ignored = hit & matches.ignored
    claims = np.flatnonzero(hit & ~matches.ignored)
    # An object is found once, by the first detection that claims it; the others are wrong. The
    # claims are in order of score, so writing them backwards leaves each object its first.
    first = np.full(matches.objects, -1)
    first[matches.object[claims[::-1]]] = claims[::-1]
    right = np.zeros(len(hit), dtype=np.bool_)
    right[first[first >= 0]] = True
    return Outcome(right, ignored)


def curves(matches: Matches, result: Outcome) -> list[tuple[Floats, Floats]]:
    """Precision and recall of each class at its right detections, in order of falling score.

    Between two right detections, recall is constant and precision only falls; no AP needs them.
    """
    counted = np.cumsum(~result.ignored)
    right = np.flatnonzero(result.right)
    bounds = np.searchsorted(right, matches.starts)
    found = []
    for label, positives in enumerate(matches.positives.tolist()):
        places = right[bounds[label] : bounds[label + 1]]
        start = int(matches.starts[label])
        before = counted[start - 1] if start else 0
        rank = np.arange(1, len(places) + 1)
        found.append((rank / (counted[places] - before), rank / max(1, positives)))
    return found


def average_precision(precision: Floats, recall: Floats, points: Points) -> float:
    """Summarise a precision-recall curve, both (d,), in order of falling score."""
    if points == "voc07":
        reached = np.searchsorted(recall, RECALL_THRESHOLDS)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)[reached]
        return float(best.sum() / len(RECALL_THRESHOLDS))
    edges = np.concatenate([[0.0], recall])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(edges) * envelope))


def average_precisions(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: int,
    points: Points,
    thresholds: Floats = IOU_THRESHOLDS,
) -> Floats:
    """AP as a fraction, (T, classes), for T thresholds that IoU must exceed.

    truths, detections: one entry per image, in the same order.
    NaN for a class without an object that is neither difficult nor crowd. Source: VOCevaldet.
    """
    matches = match(flatten_truths(truths), flatten_detections(detections), classes)
    return np.array([_values(matches, outcome(matches, t), points) for t in thresholds])


def _values(matches: Matches, result: Outcome, points: Points) -> list[float]:
    return [
        average_precision(precision, recall, points) if positives else float("nan")
        for (precision, recall), positives in zip(
            curves(matches, result), matches.positives, strict=True
        )
    ]


def voc_scores(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    points: Points,
    ious: Sequence[float] = (),
) -> Scores:
    """AP over IoU 0.50:0.05:0.95, AP50 and AP75, in percent, and AP at each of `ious`.

    truths, detections: one entry per image, in the same order. Raises ValueError when no class has
    an object that is not difficult.
    """
    thresholds = np.concatenate([IOU_THRESHOLDS, np.array(ious, dtype=np.float64)])
    percent = 100 * average_precisions(truths, detections, len(classes), points, thresholds)
    counted = ~np.isnan(percent[0])
    if not counted.any():
        raise ValueError("no class has an object to find")
    rows = {"AP": percent[: len(IOU_THRESHOLDS)].mean(axis=0)}
    for iou in (0.5, 0.75, *ious):
        rows[threshold_name(iou)] = percent[np.flatnonzero(thresholds == iou)[0]]
    return Scores(
        {name: float(row[counted].mean()) for name, row in rows.items()},
        {
            classes[label]: {name: float(row[label]) for name, row in rows.items()}
            for label in np.flatnonzero(counted).tolist()
        },
    )
