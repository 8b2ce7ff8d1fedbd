"""Mean intersection over union of semantic segmentation, as VOC and Cityscapes define it.

Pixels of all images are counted in one confusion matrix, from which each class gets

    IoU = right / (labelled as it + predicted as it - right)

Pixels labelled `IGNORE` do not count, whatever is predicted there. A class that is neither labelled
nor predicted has no IoU and is not part of the mean.
Sources: VOCevalseg.m of the VOC development kit, and evalPixelLevelSemanticLabeling.py of
cityscapesScripts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dupr_cli.metrics.types import Integers, Scores

IGNORE = 255
METRIC_NAME = "mean intersection over union of classes (mIoU), pixel and class accuracy, percent"
_PART = 1 << 18  # pixels
MEAN_IOU, PIXEL_ACCURACY, CLASS_ACCURACY = "mIoU", "pixAcc", "mAcc"

Mask = NDArray[np.uint8]


def confusion(truth: Mask, predicted: Mask, classes: int) -> Integers:
    """(classes, classes) pixels of each labelled class, by row, that got each prediction.

    truth: class numbers from 0, or IGNORE. predicted: class numbers, of the same shape.
    Raises ValueError for other values or another shape.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"a prediction of {predicted.shape} for a mask of {truth.shape}")
    # Both numbers of a pixel in 16 bits, and parts that stay in the processor's cache: arithmetic
    # on wider integers, or on whole masks, would take as long as the counting.
    counts = np.zeros(1 << 16, dtype=np.int64)
    flat, found = truth.reshape(-1), predicted.reshape(-1)
    for start in range(0, len(flat), _PART):
        pairs = flat[start : start + _PART].astype(np.uint16)
        pairs <<= 8
        pairs |= found[start : start + _PART]
        counts += np.bincount(pairs, minlength=1 << 16)
    labelled = counts.reshape(256, 256)[:IGNORE]
    if labelled[classes:].any() or labelled[:, classes:].any():
        raise ValueError(f"class numbers of {classes} classes end at {classes - 1}")
    return labelled[:classes, :classes].copy()


def semantic_scores(matrix: Integers, classes: Sequence[str]) -> Scores:
    """mIoU, the share of right pixels, and the mean of that share over labelled classes, percent.

    matrix: sum of `confusion` over all images. Raises ValueError when no pixel is labelled.
    """
    if not matrix.any():
        raise ValueError("no pixel is labelled")
    right = matrix.diagonal().astype(np.float64)
    labelled, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    united = labelled + predicted - right
    per_class: dict[str, dict[str, float]] = {}
    for number, name in enumerate(classes):
        if united[number]:
            per_class[name] = {"IoU": float(100 * right[number] / united[number])}
        if labelled[number]:
            per_class[name]["Acc"] = float(100 * right[number] / labelled[number])
    metrics = {
        MEAN_IOU: _mean(per_class, "IoU"),
        PIXEL_ACCURACY: float(100 * right.sum() / matrix.sum()),
        CLASS_ACCURACY: _mean(per_class, "Acc"),
    }
    return Scores(metrics, per_class)


def _mean(per_class: dict[str, dict[str, float]], name: str) -> float:
    return float(np.mean([of[name] for of in per_class.values() if name in of]))
