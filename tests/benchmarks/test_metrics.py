"""Matching and AP of 5,000 images x 100 detections x 20 classes, beside the plain forms.

VOC's metric beside a plain Python implementation of the development kit; the ten IoU thresholds of
a results table beside faster-coco-eval, which computes COCO's, for four ranges of sizes.

make bench prints the rates; docs/benchmarks.md says what was seen, on what.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dupr_cli.evaluate.metrics import Detections, Truth
from dupr_cli.evaluate.metrics.coco import detections_json, truths_json
from dupr_cli.evaluate.metrics.voc import IOU_THRESHOLDS, average_precisions

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
    faster = pytest.importorskip("faster_coco_eval")
    truths, found = detections_of_a_test_set()
    content, results = truths_json(truths, [str(n) for n in range(CLASSES)]), detections_json(found)

    def theirs() -> float:
        coco = faster.COCO(content)
        evaluation = faster.COCOeval_faster(coco, coco.loadRes(results), "bbox")
        start = time.perf_counter()
        evaluation.evaluate()
        evaluation.accumulate()
        return time.perf_counter() - start

    plain_form, half = by_class(truths, found), np.array([0.5])
    one, ten, coco, plain = [], [], [], []
    values: list[float] = []
    for _ in range(ROUNDS):
        one.append(seconds(lambda: average_precisions(truths, found, CLASSES, "voc10", half)))
        ten.append(
            seconds(lambda: average_precisions(truths, found, CLASSES, "voc10", IOU_THRESHOLDS))
        )
        coco.append(theirs())
        start = time.perf_counter()
        values = [plain_average_precision(objects, rows, 0.5) for objects, rows in plain_form]
        plain.append(time.perf_counter() - start)
    ours = average_precisions(truths, found, CLASSES, "voc10", half)[0]
    np.testing.assert_allclose(ours, values, atol=1e-9)
    at_one = statistics.median(p / o for p, o in zip(plain, one, strict=True))
    at_ten = statistics.median(10 * p / t for p, t in zip(plain, ten, strict=True))
    beside = statistics.median(t / c for t, c in zip(ten, coco, strict=True))
    print(
        f"\nAP50: {statistics.median(one):.2f} s, plain Python {statistics.median(plain):.2f} s, "
        f"{at_one:.1f} times faster; ten thresholds {statistics.median(ten):.2f} s "
        f"({at_ten:.1f} times ten of the plain), faster-coco-eval (evaluate, accumulate) "
        f"{statistics.median(coco):.2f} s: {beside:.2f} times its time"
    )
