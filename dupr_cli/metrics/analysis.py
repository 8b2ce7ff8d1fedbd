"""The analysis behind an AP: curves, confused classes, kinds of errors, sizes of objects.

All of it uses VOC's matching and one IoU threshold, whichever metric scored the detections. The
kinds of errors and their costs follow TIDE (Bolya et al., ECCV 2020, sections 2.2 and 2.3): AP is
computed again with all errors of one kind repaired, and the gain is the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dupr_cli.metrics.arrays import (
    DetectionArrays,
    ObjectArrays,
    box_areas,
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
    Truth,
)
from dupr_cli.metrics.voc import (
    IOU_THRESHOLDS,
    Matches,
    Outcome,
    average_precision,
    curves,
    match,
    outcome,
)

# A detection with more than the first overlap is on an object; below the second it is on none.
FOREGROUND, BACKGROUND = 0.5, 0.1
# Detections with at least this score are in the confusion matrix.
CONFUSION_SCORE = 0.5
ERROR_KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
# Areas in square pixels. Source: COCO's evaluation.
SIZES = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


@dataclass(frozen=True)
class Curve:
    """The curve of one class at its right detections, by falling score; as fractions."""

    precision: list[float]
    recall: list[float]
    scores: list[float]
    average_precision: float


@dataclass(frozen=True)
class ErrorKind:
    """count: of detections, or objects for `missed`. cost: loss of AP50 in percent."""

    count: int
    cost: float


@dataclass(frozen=True)
class SizeScores:
    """Objects of one range of sizes. AP, AP50: in percent, None if the range has no object."""

    objects: int
    AP: float | None
    AP50: float | None


@dataclass(frozen=True)
class Analysis:
    """points: of the APs in it. curves: by class. confusion: [class of the object][class found],
    numbers of objects and detections; the last row counts detections on background, the last
    column undetected objects. confusion_score: the minimum score for detections in it."""

    points: Points
    iou: float
    average_precision: float
    classes: list[str]
    curves: dict[str, Curve]
    errors: dict[str, ErrorKind]
    sizes: dict[str, SizeScores]
    confusion: list[list[int]]
    confusion_score: float


@dataclass(frozen=True)
class Verdicts:
    """What became of the detections of one image. kinds: "right", "ignored" or one of
    `ERROR_KINDS`. finds: (d,) the object that a right detection found, -1 for all others."""

    kinds: list[str]
    finds: Integers


def analyse(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    points: Points = "voc10",
) -> Analysis:
    """truths, detections: one entry per image, in the same order; labels index `classes`.

    Raises ValueError when no class has an object to find.
    """
    objects, found = flatten_truths(truths), flatten_detections(detections)
    matches = match(objects, found, len(classes))
    if not matches.positives.any():
        raise ValueError("no class has an object to find")
    result = outcome(matches, FOREGROUND)
    return Analysis(
        points=points,
        iou=FOREGROUND,
        average_precision=100 * _mean_ap(matches, result, points, matches.positives > 0),
        classes=list(classes),
        curves=_curves(matches, result, classes, points),
        errors=_errors(objects, found, matches, result, len(classes), points),
        sizes={
            name: _of_size(objects, found, len(classes), span, points)
            for name, span in SIZES.items()
        },
        confusion=_confusion(objects, found, len(classes), CONFUSION_SCORE),
        confusion_score=CONFUSION_SCORE,
    )


def _mean_ap(matches: Matches, result: Outcome, points: Points, counted: Flags) -> float:
    """counted: (classes,) the classes in the mean."""
    found = zip(curves(matches, result), counted, strict=True)
    return float(np.mean([average_precision(p, r, points) for (p, r), counts in found if counts]))


def _curves(
    matches: Matches, result: Outcome, classes: Sequence[str], points: Points
) -> dict[str, Curve]:
    right = np.flatnonzero(result.right)
    bounds = np.searchsorted(right, matches.starts)
    found = {}
    for label, (precision, recall) in enumerate(curves(matches, result)):
        if matches.positives[label]:
            scores = matches.scores[right[bounds[label] : bounds[label + 1]]]
            value = average_precision(precision, recall, points)
            found[classes[label]] = Curve(
                precision.tolist(), recall.tolist(), scores.tolist(), value
            )
    return found


@dataclass(frozen=True)
class _Overlaps:
    """The object that each detection overlaps most.

    iou: (d,) 0 without an object. object: (d,) -1 without an object.
    """

    iou: Floats
    object: Integers


@dataclass(frozen=True)
class _Judged:
    """All detections, in their own order. right, ignored: (d,). finds: (d,) the object of their
    class that they overlap most, -1 without one. own, other: the objects of their class and of
    other classes. kinds: (d,) flags of the errors, of which each wrong detection has one."""

    right: Flags
    ignored: Flags
    finds: Integers
    own: _Overlaps
    other: _Overlaps
    kinds: dict[str, Flags]


def _judged(
    objects: ObjectArrays, found: DetectionArrays, matches: Matches, result: Outcome
) -> _Judged:
    # Restore the order of `found`.
    right, ignored = np.zeros(len(found), dtype=np.bool_), np.zeros(len(found), dtype=np.bool_)
    right[matches.place], ignored[matches.place] = result.right, result.ignored
    finds = np.full(len(found), -1)
    finds[matches.place] = matches.object
    own, other = _overlaps(objects, found, same_class=True), _overlaps(objects, found, False)
    left = ~right & ~ignored
    kinds: dict[str, Flags] = {}
    # In this order: a detection that one kind claims is not counted by a later kind.
    for kind, applies in (
        ("localisation", (own.iou >= BACKGROUND) & (own.iou <= FOREGROUND)),
        ("classification", other.iou > FOREGROUND),
        ("duplicate", own.iou > FOREGROUND),
        ("background", np.maximum(own.iou, other.iou) < BACKGROUND),
        ("both", np.ones(len(found), dtype=np.bool_)),
    ):
        kinds[kind] = left & applies
        left = left & ~applies
    return _Judged(right, ignored, finds, own, other, kinds)


def judge(
    truths: Sequence[Truth], detections: Sequence[Detections], classes: int
) -> list[Verdicts]:
    """What `analyse` counts, detection by detection: one entry per image.

    A detection's verdict does not depend on those with lower scores, so that leaving these out of
    a picture changes none of the others.
    """
    # In the order of the images; a file's order only decides between equal scores.
    listed = [replace(each, order=None) for each in detections]
    objects, found = flatten_truths(truths), flatten_detections(listed)
    matches = match(objects, found, classes)
    judged = _judged(objects, found, matches, outcome(matches, FOREGROUND))
    names = np.full(len(found), "right", dtype=object)
    names[judged.ignored] = "ignored"
    for kind, flags in judged.kinds.items():
        names[flags] = kind
    finds = np.where(judged.right, judged.finds, -1)
    verdicts, start, first = [], 0, 0
    for truth, each in zip(truths, listed, strict=True):
        end = start + len(each.labels)
        of_image = finds[start:end]
        of_image = np.where(of_image >= 0, of_image - first, -1)
        verdicts.append(Verdicts([str(kind) for kind in names[start:end]], of_image))
        start, first = end, first + len(truth.labels)
    return verdicts


def best_score(
    of_images: Sequence[Verdicts], detections: Sequence[Detections], objects: int
) -> float:
    """The score from which on detections have the best F1, over all images and classes.

    of_images: the verdicts of `detections`. objects: the number of objects to find. Infinite
    without detections.
    """
    counts = [
        np.array([kind != "ignored" for kind in each.kinds], dtype=np.bool_) for each in of_images
    ]
    scores = np.concatenate([d.scores[c] for d, c in zip(detections, counts, strict=True)])
    right = np.concatenate([(v.finds >= 0)[c] for v, c in zip(of_images, counts, strict=True)])
    if not len(scores):
        return float("inf")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    # Without a right detection: as many as there are objects.
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + objects)
    best = np.argmax(f1) if hits[-1] else min(len(order), max(1, objects)) - 1
    return float(scores[order][best])


def _errors(
    objects: ObjectArrays,
    found: DetectionArrays,
    matches: Matches,
    result: Outcome,
    classes: int,
    points: Points,
) -> dict[str, ErrorKind]:
    counted = matches.positives > 0
    before = _mean_ap(matches, result, points, counted)
    judged = _judged(objects, found, matches, result)
    kinds, own, other = judged.kinds, judged.own, judged.other
    taken = np.zeros(len(objects), dtype=np.bool_)
    taken[judged.finds[judged.right]] = True

    def cost(repaired_objects: ObjectArrays, repaired: DetectionArrays) -> float:
        again = match(repaired_objects, repaired, classes)
        return 100 * (_mean_ap(again, outcome(again, FOREGROUND), points, counted) - before)

    def moved(kind: str, targets: Integers, repaired: DetectionArrays) -> float:
        """Make each object's best detection of the kind right, and remove the others."""
        wrong = np.flatnonzero(kinds[kind])
        wrong = wrong[np.argsort(-found.scores[wrong], kind="stable")]
        wrong = wrong[~taken[targets[wrong]]]
        _, first = np.unique(targets[wrong], return_index=True)
        keep = ~kinds[kind]
        keep[wrong[first]] = True
        return cost(objects, repaired.take(keep))

    label = np.where(kinds["classification"], objects.label[other.object], found.label)
    boxes = np.where(kinds["localisation"][:, None], objects.boxes[own.object], found.boxes)
    covered = taken.copy()
    covered[other.object[kinds["classification"]]] = True
    covered[own.object[kinds["localisation"]]] = True
    missed = ~covered & ~objects.ignored
    costs = {
        "classification": moved("classification", other.object, replace(found, label=label)),
        "localisation": moved("localisation", own.object, replace(found, boxes=boxes)),
        **{k: cost(objects, found.take(~kinds[k])) for k in ("both", "duplicate", "background")},
        # Objects that become ignored are no longer looked for; a class without others stays at 0.
        "missed": cost(replace(objects, ignored=objects.ignored | missed), found),
    }
    counts = {kind: int(flags.sum()) for kind, flags in {**kinds, "missed": missed}.items()}
    return {kind: ErrorKind(counts[kind], costs[kind]) for kind in ERROR_KINDS}


def _overlaps(objects: ObjectArrays, found: DetectionArrays, same_class: bool) -> _Overlaps:
    """Consider the objects to find in the image, of the detection's class or of other classes."""
    iou, best = np.zeros(len(found)), np.full(len(found), -1)
    usable = np.flatnonzero(~objects.ignored)
    by_image = usable[np.argsort(objects.image[usable], kind="stable")]
    for detection, candidate in candidate_pairs(objects.image[by_image], found.image, by_image):
        fits = (found.label[detection] == objects.label[candidate]) == same_class
        detection, candidate = detection[fits], candidate[fits]
        overlaps = pair_iou(found.boxes[detection], objects.boxes[candidate])
        # Writing from the smallest overlap to the largest keeps the largest.
        order = np.argsort(overlaps, kind="stable")
        iou[detection[order]] = overlaps[order]
        best[detection[order]] = candidate[order]
    return _Overlaps(iou, best)


def _of_size(
    objects: ObjectArrays,
    found: DetectionArrays,
    classes: int,
    span: tuple[float, float],
    points: Points,
) -> SizeScores:
    """As in COCO, other objects and unmatched detections of another size are ignored."""
    low, high = span
    inside = (objects.size >= low) & (objects.size < high) & ~objects.ignored
    matches = match(replace(objects, ignored=~inside), found, classes)
    if not inside.any():
        return SizeScores(0, None, None)
    areas = box_areas(found.boxes)[matches.place]
    elsewhere = (areas < low) | (areas >= high)
    values = []
    for threshold in IOU_THRESHOLDS:
        result = outcome(matches, threshold)
        lost = elsewhere & ~(matches.iou > threshold)
        kept = Outcome(result.right, result.ignored | lost)
        values.append(_mean_ap(matches, kept, points, matches.positives > 0))
    return SizeScores(int(inside.sum()), 100 * float(np.mean(values)), 100 * values[0])


def _confusion(
    objects: ObjectArrays, found: DetectionArrays, classes: int, score: float
) -> list[list[int]]:
    """Each object goes to the best-scored detection over FOREGROUND IoU, of any class.

    Of several free objects, a detection takes the one that it overlaps most. Detections that hit
    only ignored or taken objects of their own class are left out: duplicates are not confusion.
    """
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    confident = found.take(found.scores >= score)
    confident = confident.take(np.argsort(-confident.scores, kind="stable"))
    by_image = np.argsort(objects.image, kind="stable")
    pairs: dict[int, list[tuple[float, int]]] = {}
    for detection, candidate in candidate_pairs(objects.image[by_image], confident.image, by_image):
        overlaps = pair_iou(confident.boxes[detection], objects.boxes[candidate])
        hit = overlaps > FOREGROUND
        for d, o, iou in zip(detection[hit], candidate[hit], overlaps[hit], strict=True):
            pairs.setdefault(int(d), []).append((-float(iou), int(o)))
    free = ~objects.ignored
    for d, label in enumerate(confident.label.tolist()):
        hits = sorted(pairs.get(d, []))
        choice = next((o for _, o in hits if free[o]), None)
        if choice is not None:
            free[choice] = False
            counts[objects.label[choice], label] += 1
        elif not any(objects.label[o] == label for _, o in hits):
            counts[classes, label] += 1
    counts[:classes, classes] = np.bincount(objects.label[free], minlength=classes)
    rows: list[list[int]] = counts.tolist()
    return rows
