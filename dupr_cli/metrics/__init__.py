"""The metrics of detection: one function for all of them, selected by name.

VOC's average precision is computed here (voc.py), as is Cityscapes' (cityscapes.py), and COCO's by
faster-coco-eval (coco.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from dupr_cli.metrics.cityscapes import cityscapes_scores
from dupr_cli.metrics.coco import coco_scores, coco_segm_scores
from dupr_cli.metrics.types import (
    METRIC_NAMES,
    Detections,
    Metric,
    Points,
    Rle,
    Scores,
    Truth,
)
from dupr_cli.metrics.voc import voc_scores

__all__ = [
    "METRIC_NAMES",
    "Detections",
    "Metric",
    "Points",
    "Rle",
    "Scores",
    "Truth",
    "score",
]


def score(
    metric: Metric,
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    ious: Sequence[float] = (),
) -> Scores:
    """AP, AP50, AP75 and the metric's other numbers, in percent.

    truths, detections: one entry per image, in the same order; labels are indices into `classes`.
    ious: further IoU thresholds, whose AP is added as AP30 and so on. coco-segm returns the numbers
    for boxes under their usual names, and those for masks as segm_AP, segm_AP50, ... beside them;
    cityscapes adds its own cityscapes_AP and cityscapes_AP50.
    Raises ValueError when no class has an object to find, or masks are missing.
    """
    if metric == "coco":
        return coco_scores(truths, detections, classes, ious)
    if metric == "coco-segm":
        return coco_segm_scores(truths, detections, classes, ious)
    if metric == "cityscapes":
        return _joined(
            coco_segm_scores(truths, detections, classes, ious),
            cityscapes_scores(truths, detections, classes),
        )
    return voc_scores(truths, detections, classes, metric, ious)


def _joined(first: Scores, second: Scores) -> Scores:
    rows = {
        name: {**row, **second.per_class.get(name, {})} for name, row in first.per_class.items()
    }
    return Scores({**first.metrics, **second.metrics}, rows)
