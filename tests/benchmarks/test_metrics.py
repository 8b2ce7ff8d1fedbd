"""Matching and AP of 5,000 images x 100 detections x 20 classes, beside the plain forms.

VOC's metric beside a plain Python implementation of the development kit, and beside
faster-coco-eval, at IoU 0.5 and at the ten thresholds of a results table. All compute one AP for
each class and threshold: faster-coco-eval is asked for objects of all sizes and 100 detections per
image only, as it usually computes four ranges of sizes.

What each reads its input into is counted twice: with it, and without (ours from flat arrays, the
plain form from lists by class, faster-coco-eval from its indexed sets).

COCO's metric, beside faster-coco-eval by itself and pycocotools. All three begin with the parsed
JSON and end with the twelve figures; `ours_from_arrays` begins with arrays instead.

make bench prints the rates; docs/benchmarks.md says what was seen, on what.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from dupr_cli.metrics import Detections, Truth
from dupr_cli.metrics.arrays import flatten_detections, flatten_truths
from dupr_cli.metrics.coco import (
    STATISTICS,
    coco_json_scores,
    coco_scores,
    detections_json,
    truths_json,
)
from dupr_cli.metrics.voc import (
    IOU_THRESHOLDS,
    average_precision,
    average_precisions,
    curves,
    match,
    outcome,
)

IMAGES, PER_IMAGE, CLASSES, ROUNDS = 5000, 100, 20, 5


def detections_of_a_test_set() -> tuple[list[Truth], list[Detections]]:
    """One to six objects an image; a third of the detections lie near one, the others anywhere."""
    random = np.random.default_rng(0)
    truths, found = [], []
    for _ in range(IMAGES):
        count = int(random.integers(1, 7))
        boxes, labels = some_boxes(random, count), random.integers(0, CLASSES, count)
        truths.append(Truth(boxes, labels, random.random(count) < 0.1))
        near = random.integers(0, count, PER_IMAGE // 3)
        moved = boxes[near] + random.normal(0, 6, (len(near), 4))
        others = PER_IMAGE - len(near)
        found.append(
            Detections(
                np.concatenate([moved, some_boxes(random, others)]),
                np.concatenate([labels[near], random.integers(0, CLASSES, others)]),
                random.random(PER_IMAGE),
            )
        )
    return truths, found


def some_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corners = random.uniform(0, 350, (count, 2))
    return np.concatenate([corners, corners + random.uniform(20, 150, (count, 2))], axis=1)


# Of one class: boxes and whether they are difficult, by image; score, image and box.
Objects = dict[int, list[tuple[list[float], bool]]]
Rows = list[tuple[float, int, list[float]]]


def by_class(
    truths: Sequence[Truth], detections: Sequence[Detections]
) -> list[tuple[Objects, Rows]]:
    """As the kit's files are: not part of what is measured."""
    classes: list[tuple[Objects, Rows]] = [({}, []) for _ in range(CLASSES)]
    for image, (truth, found) in enumerate(zip(truths, detections, strict=True)):
        for box, label, difficult in zip(
            truth.boxes.tolist(), truth.labels.tolist(), truth.difficult.tolist(), strict=True
        ):
            classes[label][0].setdefault(image, []).append((box, difficult))
        for box, label, score in zip(
            found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        ):
            classes[label][1].append((score, image, box))
    return classes


def plain_average_precision(objects: Objects, rows: Rows, threshold: float) -> float:
    """VOC's AP (area) of one class, written as the kit goes about it: one detection at a time."""
    positives = sum(not difficult for boxes in objects.values() for _, difficult in boxes)
    rows = sorted(rows, key=lambda row: -row[0])
    taken: set[tuple[int, int]] = set()
    right = wrong = 0
    points = []
    for _, image, (x0, y0, x1, y1) in rows:
        best, chosen = 0.0, -1
        for number, ((a0, b0, a1, b1), _) in enumerate(objects.get(image, [])):
            width, height = min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0)
            if width > 0 and height > 0:
                shared = width * height
                iou = shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared)
                if iou > best:
                    best, chosen = iou, number
        if best > threshold:
            if objects[image][chosen][1]:
                continue
            if (image, chosen) in taken:
                wrong += 1
            else:
                taken.add((image, chosen))
                right += 1
        else:
            wrong += 1
        points.append((right / positives, right / (right + wrong)))
    area, envelope = 0.0, 0.0
    for place in range(len(points) - 1, -1, -1):
        envelope = max(envelope, points[place][1])
        area += (points[place][0] - (points[place - 1][0] if place else 0.0)) * envelope
    return area


def seconds(compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def test_voc_beside_plain_python_and_faster_coco_eval() -> None:
    truths, found = detections_of_a_test_set()
    content, results = truths_json(truths, [str(n) for n in range(CLASSES)]), detections_json(found)
    objects, rows, lists = (
        flatten_truths(truths),
        flatten_detections(found),
        by_class(truths, found),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = faster_coco_eval.COCO(content)
        coco_found = coco.loadRes(results)

    def ours(thresholds: Sequence[float]) -> None:
        matches = match(objects, rows, CLASSES)
        for threshold in thresholds:
            for precision, recall in curves(matches, outcome(matches, threshold)):
                average_precision(precision, recall, "voc10")

    def ours_with_reading(thresholds: Sequence[float]) -> None:
        average_precisions(truths, found, CLASSES, "voc10", np.array(thresholds))

    def plain(thresholds: Sequence[float], lists: list[tuple[Objects, Rows]] = lists) -> None:
        for threshold in thresholds:
            for boxes, detections in lists:
                plain_average_precision(boxes, detections, threshold)

    def plain_with_reading(thresholds: Sequence[float]) -> None:
        plain(thresholds, by_class(truths, found))

    def theirs(thresholds: Sequence[float]) -> None:
        evaluation = faster_coco_eval.COCOeval_faster(coco, coco_found, "bbox")
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [PER_IMAGE]
        evaluation.evaluate()
        evaluation.accumulate()

    values = [plain_average_precision(boxes, detections, 0.5) for boxes, detections in lists]
    computed = average_precisions(truths, found, CLASSES, "voc10", np.array([0.5]))[0]
    np.testing.assert_allclose(computed, values, atol=1e-9)
    forms = (ours, plain, theirs, ours_with_reading, plain_with_reading)
    for thresholds, rounds in (([0.5], ROUNDS), (IOU_THRESHOLDS.tolist(), 3)):
        # In turn, so that what else the machine does meets all of them.
        times = [[seconds(partial(form, thresholds)) for form in forms] for _ in range(rounds)]
        print(f"\n{len(thresholds)} thresholds of IoU, median of {rounds}")
        for number, form in enumerate(forms):
            own = 3 if form in (ours_with_reading, plain_with_reading) else 0
            ratio = statistics.median(row[number] / row[own] for row in times)
            middle = statistics.median(row[number] for row in times)
            print(f"  {form.__name__:20}{middle:8.3f} s  {ratio:6.1f} times ours")


def test_coco_beside_faster_coco_eval_and_pycocotools() -> None:
    truths, found = detections_of_a_test_set()
    classes = [str(number) for number in range(CLASSES)]
    content, results = truths_json(truths, classes), detections_json(found)

    def by_library(coco: Any, evaluate: Any) -> list[float]:
        coco.dataset = own_content
        coco.createIndex()
        evaluation = evaluate(coco, coco.loadRes(own_results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        figures: list[float] = (100 * np.array(evaluation.stats)).tolist()
        return figures

    def ours() -> list[float]:
        scores = coco_json_scores(content, results, "bbox")
        return [scores.metrics[name] for name in STATISTICS]

    def ours_from_arrays() -> list[float]:
        scores = coco_scores(truths, found, classes)
        return [scores.metrics[name] for name in STATISTICS]

    def faster_by_itself() -> list[float]:
        return by_library(faster_coco_eval.COCO(), faster_coco_eval.COCOeval_faster)

    def by_pycocotools() -> list[float]:
        return by_library(pycocotools.coco.COCO(), pycocotools.cocoeval.COCOeval)

    forms = (ours, ours_from_arrays, faster_by_itself, by_pycocotools)
    times = []
    for _ in range(3):
        row, figures = [], []
        for form in forms:
            # Both libraries write into what they are given, so each gets a copy, outside the clock.
            own_content, own_results = copy.deepcopy((content, results))
            with contextlib.redirect_stdout(io.StringIO()):
                start = time.perf_counter()
                figures.append(form())
                row.append(time.perf_counter() - start)
        times.append(row)
        assert figures[0] == figures[1] == figures[3]
    print("\nCOCO's twelve figures, median of 3")
    for number, form in enumerate(forms):
        middle = statistics.median(row[number] for row in times)
        ratio = statistics.median(row[number] / row[2] for row in times)
        print(f"  {form.__name__:20}{middle:8.3f} s  {ratio:6.2f} times faster-coco-eval by itself")
