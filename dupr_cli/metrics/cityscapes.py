"""Cityscapes' own average precision of instance masks, beside COCO's.

It differs from COCO's in what is left out (instances of fewer than 100 pixels, groups, and void
pixels), in matching (an overlap must exceed the threshold, and of several detections of one
instance all but the surest are wrong), and in the curve (every score is a threshold, nothing is
interpolated). Where the distance of instances is known, AP within 50 and 100 metres is given too.

Source: cityscapesScripts, evaluation/evalInstanceLevelSemanticLabeling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from dupr_cli.metrics.types import Detections, Flags, Floats, Integers, Rle, Scores, Truth

THRESHOLDS: Floats = np.arange(0.5, 1.0, 0.05)


@dataclass(frozen=True)
class _Limits:
    """What counts as an instance. pixels: the fewest. metres: the farthest, if `confidence` of its
    pixels have a distance."""

    suffix: str
    pixels: int
    metres: float = np.inf
    confidence: float = -np.inf


_ALL = _Limits("", 100)
_NEAR = (_Limits("50m", 1000, 50.0, 0.5), _Limits("100m", 1000, 100.0, 0.5))


@dataclass(frozen=True)
class _Overlaps:
    """Instances and detections of one class in one image.

    pixels: (n,) of each instance. group: (n,) an instance stands for several objects. distance:
    (n, 2) its median in metres, and the share of pixels that have one. shared: (n, d) pixels that
    an instance and a detection have in common. found: (d,) pixels of each detection. void: (d,)
    pixels of each that are no object's. scores: (d,).
    """

    pixels: Integers
    group: Flags
    distance: Floats
    shared: Integers
    found: Integers
    void: Integers
    scores: Floats

    def counted(self, limits: _Limits) -> Flags:
        """(n,) the instances that a detector has to find."""
        counted: Flags = ~self.group & ~self._left_out(limits)
        return counted

    def _left_out(self, limits: _Limits) -> Flags:
        median, confidence = self.distance.T
        far = (median > limits.metres) | (confidence < limits.confidence)
        left_out: Flags = (self.pixels < limits.pixels) | far
        return left_out

    def judge(self, threshold: float, limits: _Limits) -> tuple[Floats, Floats, int]:
        """Scores of right detections, scores of wrong ones, and the number of missed instances."""
        union = self.pixels[:, None] + self.found[None] - self.shared
        matched = self.shared / union > threshold
        right, wrong = [], []
        counted = self.counted(limits)
        for row in matched[counted]:
            # The surest detection of an instance is right, any other is wrong.
            found = sorted(self.scores[row].tolist())
            right += found[-1:]
            wrong += found[:-1]
        # A detection of nothing is wrong, unless most of it lies where nothing counts.
        ignored = self.void + (self.shared * self.group[:, None]).sum(axis=0)
        ignored = ignored + (self.shared * self._left_out(limits)[:, None]).sum(axis=0)
        of_nothing = ~matched.any(axis=0) & (ignored / self.found <= threshold)
        wrong += self.scores[of_nothing].tolist()
        missed = int(counted.sum()) - len(right)
        return np.array(right), np.array(wrong), missed


def cityscapes_scores(
    truths: Sequence[Truth], detections: Sequence[Detections], classes: Sequence[str]
) -> Scores:
    """cityscapes_AP and cityscapes_AP50, over all classes and of each, in percent.

    If instances have distances, the same of instances within 50 and 100 metres, which then need
    1,000 pixels: cityscapes_AP_50m, cityscapes_AP50_50m and so on. Classes without an instance that
    counts are left out; if no class has one, there are no figures.
    Raises ValueError when masks are missing.
    """
    entries: list[Truth | Detections] = [*truths, *detections]
    if any(entry.masks is None and len(entry.labels) for entry in entries):
        raise ValueError("Cityscapes' AP needs the masks of all objects and detections")
    near = _NEAR if any(truth.distances is not None for truth in truths) else ()
    rows: dict[str, dict[str, float]] = {}
    for label, name in enumerate(classes):
        images = [_overlaps(*pair, label) for pair in zip(truths, detections, strict=True)]
        row: dict[str, float] = {}
        for limits in (_ALL, *near):
            curve = [_average_precision(images, float(iou), limits) for iou in THRESHOLDS]
            if not np.isnan(curve[0]):
                end = f"_{limits.suffix}" if limits.suffix else ""
                row[f"cityscapes_AP{end}"] = 100 * float(np.mean(curve))
                row[f"cityscapes_AP50{end}"] = 100 * curve[0]
        if "cityscapes_AP" in row:
            rows[name] = row
    names = dict.fromkeys(name for row in rows.values() for name in row)
    metrics = {
        name: float(np.mean([row[name] for row in rows.values() if name in row])) for name in names
    }
    return Scores(metrics, rows)


def _overlaps(truth: Truth, found: Detections, label: int) -> _Overlaps:
    chosen = np.flatnonzero(np.asarray(truth.labels) == label)
    instances = [truth.masks[i] for i in chosen] if truth.masks else []
    guessed = np.flatnonzero(np.asarray(found.labels) == label)
    masks = [found.masks[i] for i in guessed] if found.masks else []
    areas = _areas(masks)
    drawn = np.flatnonzero(areas > 0)  # a detection without pixels does not count at all
    masks, guessed = [masks[i] for i in drawn], guessed[drawn]
    crowd = truth.crowd if truth.crowd is not None else np.zeros(len(truth.labels), dtype=np.bool_)
    distance = np.tile([-1.0, 0.0], (len(chosen), 1))
    if truth.distances is not None:
        distance = np.asarray(truth.distances, dtype=np.float64)[chosen]
    void = [] if truth.void is None else [truth.void]
    return _Overlaps(
        _areas(instances),
        np.asarray(crowd)[chosen],
        distance.reshape(-1, 2),
        _shared(instances, masks),
        areas[drawn],
        _shared(void, masks).sum(axis=0),
        np.asarray(found.scores, dtype=np.float64)[guessed],
    )


def _areas(masks: Sequence[Rle]) -> Integers:
    # One by one, because pycocotools cannot count more than 255 masks at a time.
    return np.array([int(coco_mask.area(mask)) for mask in masks], dtype=np.int64)


def _shared(first: Sequence[Rle], second: Sequence[Rle]) -> Integers:
    """(n, d) pixels that two masks have in common."""
    shared: NDArray[np.int64] = np.zeros((len(first), len(second)), dtype=np.int64)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            shared[i, j] = coco_mask.area(coco_mask.merge([one, other], intersect=True))
    return shared


def _average_precision(images: Sequence[_Overlaps], threshold: float, limits: _Limits) -> float:
    """The area under one curve of precision and recall; nan without an instance that counts.

    The curve has a point for each score, and precision 1 at recall 0; each point stands for half
    the way to its neighbours.
    """
    right, wrong, missed = [], [], 0
    for image in images:
        of_image = image.judge(threshold, limits)
        right.append(of_image[0])
        wrong.append(of_image[1])
        missed += of_image[2]
    true, false = np.sort(np.concatenate(right)), np.sort(np.concatenate(wrong))
    if not len(true) + missed:
        return float("nan")
    scores = np.unique(np.concatenate([true, false]))
    if not len(scores):
        return 0.0
    tp = len(true) - np.searchsorted(true, scores)
    fp = len(false) - np.searchsorted(false, scores)
    precision = np.append(tp / (tp + fp), 1.0)
    recall = np.append(tp / (len(true) + missed), 0.0)
    around = np.concatenate([recall[:1], recall, [0.0]])
    return float(np.dot(precision, (around[:-2] - around[2:]) / 2))
