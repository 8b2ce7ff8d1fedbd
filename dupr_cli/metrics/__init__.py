"""The metrics of detection: one function for all of them, selected by name.

VOC's average precision is computed here (voc.py), COCO's by faster-coco-eval (coco.py).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    for boxes under their usual names, and those for masks as segm_AP, segm_AP50, ... beside them.
    Raises ValueError when no class has an object to find, or masks are missing.
    """
    if metric == "coco":
        return coco_scores(truths, detections, classes, ious)
    if metric == "coco-segm":
        return coco_segm_scores(truths, detections, classes, ious)
    return voc_scores(truths, detections, classes, metric, ious)
