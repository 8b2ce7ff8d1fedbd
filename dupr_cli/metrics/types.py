"""Input and output of the detection metrics: objects, detections, scores.

Boxes are pixel edges, 0-based and half-open, x_min, y_min, x_max, y_max (`artifacts.labels`), in
the pixels of the image. Labels are class numbers from 0. Every image has one `Truth` and one
`Detections`, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

Points = Literal["voc07", "voc10"]
Metric = Literal["voc07", "voc10", "coco", "coco-segm", "coco-keypoints", "cityscapes"]

# How exactly people place each of COCO's 17 keypoints of a person, as a share of the square root of
# the object's area. Source: pycocotools, Params.setKpParams.
COCO_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107,
    0.087, 0.087, 0.089, 0.089,
)  # fmt: skip

METRIC_NAMES: dict[Metric, str] = {
    "voc07": "VOC07 11-point AP over IoU 0.50:0.05:0.95, AP50 and AP75, percent",
    "voc10": "VOC10 area-under-curve AP over IoU 0.50:0.05:0.95, AP50 and AP75, percent",
    "coco": "COCO box AP over IoU 0.50:0.05:0.95 at 101 recall points, percent",
    "coco-segm": "COCO box and mask AP over IoU 0.50:0.05:0.95 at 101 recall points, percent",
    "coco-keypoints": "COCO box AP, and keypoint AP by OKS (keypoint_AP), percent",
    "cityscapes": "COCO box and mask AP, and Cityscapes' own mask AP (cityscapes_AP), percent",
}


class Rle(TypedDict):
    """A mask in COCO's compressed run-length form. size: height, width of the image, pixels."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Truth:
    """Objects of one image.

    boxes: (n, 4) float. labels: (n,) class numbers. difficult: (n,) bool, VOC's flag. crowd: (n,)
    bool, COCO's flag. areas: (n,) float, pixels, COCO's measure of size, if not the box's area.
    masks: one per object, for coco-segm and cityscapes. void: pixels that belong to no class, where
    a detection is neither right nor wrong for Cityscapes. distances: (n, 2), the median distance of
    an object in metres, and the share of its pixels that have one. keypoints: (n, K, 3) x, y and
    COCO's visibility, 0 where it is not labelled; x and y index a pixel, whose centre they are.
    """

    boxes: NDArray[np.floating]
    labels: Integers
    difficult: Flags
    crowd: Flags | None = None
    areas: NDArray[np.floating] | None = None
    masks: tuple[Rle, ...] | None = None
    void: Rle | None = None
    distances: Floats | None = None
    keypoints: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Detections:
    """The output of a detector for one image.

    boxes: (d, 4) float. labels: (d,). scores: (d,). masks: one per detection, for coco-segm. order:
    (d,) positions in the source file, over all images: VOC's metric keeps this order among equal
    scores. None: one image after the other. keypoints: (d, K, 3) x, y as in `Truth`, and a score,
    for coco-keypoints.
    """

    boxes: NDArray[np.floating]
    labels: Integers
    scores: NDArray[np.floating]
    masks: tuple[Rle, ...] | None = None
    order: Integers | None = None
    keypoints: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Scores:
    """AP, AP50, AP75, then the metric's other numbers, in percent: overall, and of each class.

    Undefined numbers are left out, such as those of a class without an object to find.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]


def threshold_name(iou: float) -> str:
    """AP50 for an IoU of 0.5."""
    return f"AP{100 * iou:.6g}"
