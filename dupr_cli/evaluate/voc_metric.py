"""VOC's average precision, as the development kit defines it and MoCo's transfer tables report it.

Detections and ground truth of a test set go in, AP per class and IoU threshold comes out. IoU is
computed once per image and class; every threshold is then a comparison of the same numbers.

Boxes are pixel edges, 0-based and half-open (`artifacts.voc_tree`). The kit counts inclusive
pixels, xmin = x_min + 1 and xmax = x_max, so its width xmax - xmin + 1 is x_max - x_min here, and
the same holds for intersections: plain IoU of the edges is the kit's IoU with its +1.

Source: the VOC 2007 and 2010 development kits, VOCevaldet; the mean over IoU 0.50:0.05:0.95 is
detectron2's addition. Scores are taken as they are, not rounded to three decimals on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Points = Literal["voc07", "voc10"]

# Whole percents over 100: 55 / 100 is not the 0.55 that adding up 0.05 arrives at.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
# As MATLAB and numpy make the range: its 0.3 is 0.30000000000000004, and that moves an AP.
RECALL_THRESHOLDS = np.arange(0, 1.1, 0.1)

METRIC_NAMES: dict[Points, str] = {
    "voc07": "VOC07 11-point AP over IoU 0.50:0.05:0.95, AP50 and AP75, percent",
    "voc10": "VOC10 area-under-curve AP over IoU 0.50:0.05:0.95, AP50 and AP75, percent",
}


@dataclass(frozen=True)
class Truth:
    """Objects of one image. boxes: (n, 4). labels: (n,) class numbers. difficult: (n,) bool."""

    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]


@dataclass(frozen=True)
class Detections:
    """What a detector says about one image. boxes: (d, 4). labels: (d,). scores: (d,)."""

    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating]


@dataclass(frozen=True)
class VocScores:
    """AP, AP50, AP75 in percent: the mean over classes, and each class.

    Classes without an object that is not difficult have no AP: they are left out of both.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Matches:
    """Detections of one class over all images, highest score first.

    iou: (d,) with the object of highest IoU, 0 where the image has none. object: (d,) its number,
    counted over all images. difficult: (d,) whether that object is.
    """

    iou: Floats
    object: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    positives: int


def box_iou(boxes: Floats, others: Floats) -> Floats:
    """(n, 4) and (m, 4) pixel edges to (n, m) intersection over union."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    union = _areas(boxes)[:, None] + _areas(others)[None, :] - intersection
    iou: Floats = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def _areas(boxes: Floats) -> Floats:
    areas: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _match(truths: Sequence[Truth], detections: Sequence[Detections], label: int) -> _Matches:
    """Pair each detection of a class with the object it overlaps most, taken or not."""
    scores, ious, objects, difficult = [], [], [], []
    first, positives = 0, 0
    for truth, detected in zip(truths, detections, strict=True):
        of_class, found = truth.labels == label, detected.labels == label
        flags = truth.difficult[of_class]
        positives += int(np.count_nonzero(~flags))
        if found.any():
            count = int(np.count_nonzero(found))
            scores.append(detected.scores[found].astype(np.float64))
            if len(flags):
                iou = box_iou(
                    detected.boxes[found].astype(np.float64),
                    truth.boxes[of_class].astype(np.float64),
                )
                best = iou.argmax(axis=1)
                ious.append(iou.max(axis=1))
                objects.append(first + best)
                difficult.append(flags[best])
            else:
                ious.append(np.zeros(count))
                objects.append(np.full(count, -1))
                difficult.append(np.zeros(count, dtype=np.bool_))
        first += len(flags)
    if not scores:
        nothing = np.zeros(0)
        return _Matches(nothing, nothing.astype(np.int64), nothing.astype(np.bool_), positives)
    # Stable: detections of equal score keep the order in which they were given.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Matches(
        np.concatenate(ious)[order],
        np.concatenate(objects)[order],
        np.concatenate(difficult)[order],
        positives,
    )


def _precision_recall(matches: _Matches, threshold: float) -> tuple[Floats, Floats]:
    """Precision and recall after each detection, highest score first."""
    hit = matches.iou > threshold
    ignored = hit & matches.difficult
    claims = np.flatnonzero(hit & ~matches.difficult)
    # An object is found once, by the first detection that claims it; the others are wrong.
    _, earliest = np.unique(matches.object[claims], return_index=True)
    right = np.zeros(len(hit), dtype=np.bool_)
    right[claims[earliest]] = True
    true_positives = np.cumsum(right)
    false_positives = np.cumsum(~right & ~ignored)
    counted = np.maximum(true_positives + false_positives, np.finfo(np.float64).eps)
    return true_positives / counted, true_positives / matches.positives


def average_precision(precision: Floats, recall: Floats, points: Points) -> float:
    """One number for a precision-recall curve, both (d,), in order of falling score."""
    if points == "voc07":
        reached = recall[None, :] >= RECALL_THRESHOLDS[:, None]  # (11, d)
        best = np.where(reached, precision[None, :], 0.0).max(axis=1, initial=0.0)
        return float(best.sum() / len(RECALL_THRESHOLDS))
    edges = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(edges) * envelope[1:]))


def average_precisions(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: int,
    points: Points,
    thresholds: Floats = IOU_THRESHOLDS,
) -> Floats:
    """AP as a fraction, (T, classes), for T thresholds that IoU must exceed.

    truths, detections: one entry per image, in the same order.
    NaN for a class without an object that is not difficult. Source: VOCevaldet.
    """
    values = np.full((len(thresholds), classes), np.nan)
    for label in range(classes):
        matches = _match(truths, detections, label)
        if matches.positives:
            for row, threshold in enumerate(thresholds):
                curve = _precision_recall(matches, threshold)
                values[row, label] = average_precision(*curve, points)
    return values


def voc_scores(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    points: Points,
) -> VocScores:
    """AP over IoU 0.50:0.05:0.95, AP50 and AP75, in percent.

    truths, detections: one entry per image, in the same order. Raises ValueError when no class has
    an object that is not difficult.
    """
    percent = 100 * average_precisions(truths, detections, len(classes), points)
    counted = ~np.isnan(percent[0])
    if not counted.any():
        raise ValueError("no class has an object to find")
    rows = {
        "AP": percent.mean(axis=0),
        "AP50": percent[np.flatnonzero(IOU_THRESHOLDS == 0.5)[0]],
        "AP75": percent[np.flatnonzero(IOU_THRESHOLDS == 0.75)[0]],
    }
    return VocScores(
        {name: float(row[counted].mean()) for name, row in rows.items()},
        {
            classes[label]: {name: float(row[label]) for name, row in rows.items()}
            for label in np.flatnonzero(counted).tolist()
        },
    )
