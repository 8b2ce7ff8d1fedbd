"""The metrics of detection: one function for all of them, selected by name.

VOC's average precision is computed here (voc.py), as is Cityscapes' (cityscapes.py), and COCO's by
faster-coco-eval (coco.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dupr_cli.metrics.cityscapes import cityscapes_scores
from dupr_cli.metrics.coco import (
    coco_keypoint_scores,
    coco_scores,
    coco_segm_scores,
    joined_scores,
)
from dupr_cli.metrics.types import (
    COCO_SIGMAS,
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
    "COCO_SIGMAS",
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
    sigmas: Sequence[float] | Mapping[str, Sequence[float]] = COCO_SIGMAS,
) -> Scores:
    """AP, AP50, AP75 and the metric's other numbers, in percent.

    truths, detections: one entry per image, in the same order; labels are indices into `classes`.
    ious: further IoU thresholds, whose AP is added as AP30 and so on. coco-segm returns the numbers
    for boxes under their usual names, and those for masks as segm_AP, segm_AP50, ... beside them;
    cityscapes adds its own cityscapes_AP and cityscapes_AP50, coco-keypoints keypoint_AP and so on.
    sigmas: of keypoints, see `coco_keypoint_scores`.
    Raises ValueError when no class has an object to find, or masks are missing.
    """
    if metric == "coco":
        return coco_scores(truths, detections, classes, ious)
    if metric == "coco-segm":
        return coco_segm_scores(truths, detections, classes, ious)
    if metric == "coco-keypoints":
        return coco_keypoint_scores(truths, detections, classes, sigmas, ious)
    if metric == "cityscapes":
        return joined_scores(
            coco_segm_scores(truths, detections, classes, ious),
            cityscapes_scores(truths, detections, classes),
        )
    return voc_scores(truths, detections, classes, metric, ious)
