"""The metric against stated figures, pycocotools and a plain loop, and trap by trap."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dupr_cli.metrics import Detections, Points, Truth
from dupr_cli.metrics.voc import (
    RECALL_THRESHOLDS,
    average_precision,
    average_precisions,
    voc_scores,
)
from tests.support.known_case import DETECTIONS, STATED_VOC07, STATED_VOC10, TRUTHS

KitBox = tuple[float, float, float, float]


def edges(boxes: list[KitBox]) -> np.ndarray:
    """The kit's inclusive pixels, counted from 1, as pixel edges (see artifacts.voc_tree)."""
    return np.array(boxes, dtype=np.float64).reshape(-1, 4) - [1, 1, 0, 0]


def truth(
    boxes: list[KitBox], labels: list[int] | None = None, difficult: Sequence[int] = ()
) -> Truth:
    labels = labels or [0] * len(boxes)
    flags = np.isin(np.arange(len(boxes)), list(difficult))
    return Truth(edges(boxes), np.array(labels, dtype=np.int64), flags)


def detected(
    boxes: list[KitBox], scores: list[float], labels: list[int] | None = None
) -> Detections:
    labels = labels or [0] * len(boxes)
    return Detections(edges(boxes), np.array(labels, dtype=np.int64), np.array(scores))


def ap(
    truths: list[Truth],
    detections: list[Detections],
    iou: float = 0.5,
    points: Points = "voc10",
) -> float:
    value = average_precisions(truths, detections, 1, points, np.array([iou]))
    return float(value[0, 0])


@pytest.mark.parametrize(
    ("points", "iou", "stated"),
    [
        *(("voc10", iou, stated) for iou, stated in STATED_VOC10.items()),
        *(("voc07", iou, stated) for iou, stated in STATED_VOC07.items()),
    ],
)
def test_stated_figures_of_a_known_case(points: Points, iou: float, stated: float) -> None:
    truths = [truth([(x, y, x + w, y + h) for x, y, w, h in boxes]) for boxes in TRUTHS.values()]
    detections = [
        detected([(x, y, x + w, y + h) for _, x, y, w, h in found], [row[0] for row in found])
        for found in DETECTIONS.values()
    ]
    assert ap(truths, detections, iou, points) == pytest.approx(stated, abs=1e-6)


def test_areas_count_inclusive_pixels() -> None:
    # 2 x 1 pixels in 3 x 1: IoU 2/3. Without the +1 the boxes have no area at all.
    assert ap([truth([(1, 1, 3, 1)])], [detected([(1, 1, 2, 1)], [0.9])]) == 1.0


def test_iou_must_exceed_the_threshold() -> None:
    half = [detected([(1, 1, 10, 10)], [0.9])]
    assert ap([truth([(1, 1, 10, 20)])], half, iou=0.5) == 0.0
    assert ap([truth([(1, 1, 10, 20)])], half, iou=0.4999) == 1.0


def test_detection_on_a_taken_object_is_wrong_even_if_another_would_do() -> None:
    # Both detections overlap the first object most; the second also overlaps the other by 0.6.
    objects = truth([(1, 1, 100, 100), (1, 31, 100, 130)])
    found = detected([(1, 1, 100, 100), (1, 11, 100, 110)], [0.9, 0.8])
    assert ap([objects], [found]) == pytest.approx(0.5)  # COCO's matching finds both: 1.0


def test_of_objects_overlapped_alike_the_first_counts() -> None:
    box = (1.0, 1.0, 10.0, 10.0)
    right_first = truth([box, box], difficult=[1])
    assert ap([right_first], [detected([box], [0.9])]) == 1.0
    difficult_first = truth([box, box], difficult=[0])
    assert ap([difficult_first], [detected([box], [0.9])]) == 0.0


def test_equal_scores_keep_their_order() -> None:
    right, wrong = (1.0, 1.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    objects = [truth([right])]
    assert ap(objects, [detected([right, wrong], [0.5, 0.5])]) == 1.0
    assert ap(objects, [detected([wrong, right], [0.5, 0.5])]) == pytest.approx(0.5)


def test_equal_scores_keep_the_order_of_many_images() -> None:
    # An unstable sort shows only beyond numpy's small-array cutoff of 16.
    box = (1.0, 1.0, 10.0, 10.0)
    truths = [truth([box]) for _ in range(20)] + [truth([]) for _ in range(20)]
    detections = [detected([box], [0.5]) for _ in range(40)]
    assert ap(truths, detections) == 1.0


def test_detections_on_difficult_objects_are_neither_right_nor_wrong() -> None:
    objects = truth([(1, 1, 10, 10), (51, 51, 60, 60)], difficult=[1])
    found = detected([(51, 51, 60, 60), (51, 51, 60, 61), (1, 1, 10, 10)], [0.9, 0.8, 0.7])
    assert ap([objects], [found]) == 1.0


def test_difficult_objects_are_not_missed() -> None:
    objects = truth([(1, 1, 10, 10), (51, 51, 60, 60)], difficult=[1])
    assert ap([objects], [detected([(1, 1, 10, 10)], [0.9])]) == 1.0


def test_recall_of_three_tenths_does_not_reach_the_fourth_point() -> None:
    # The fourth recall threshold is 0.30000000000000004, more than 3 / 10.
    assert RECALL_THRESHOLDS[3] > 0.3
    boxes = [(100.0 * i + 1, 1.0, 100.0 * i + 50, 50.0) for i in range(10)]
    found = detected(boxes[:3], [0.9, 0.8, 0.7])
    assert ap([truth(boxes)], [found], points="voc07") == pytest.approx(3 / 11)


def test_area_under_the_curve_takes_the_envelope() -> None:
    precision, recall = np.array([1.0, 0.5, 2 / 3]), np.array([0.5, 0.5, 1.0])
    assert average_precision(precision, recall, "voc10") == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_class_without_objects_is_left_out_of_the_mean() -> None:
    box = (1.0, 1.0, 10.0, 10.0)
    truths = [truth([box, box], labels=[0, 2], difficult=[1])]
    detections = [detected([box, box, box], [0.9, 0.8, 0.7], labels=[0, 1, 2])]
    scores = voc_scores(truths, detections, ["cat", "cow", "dog"], "voc07")
    assert scores.metrics["AP50"] == pytest.approx(100)
    assert list(scores.per_class) == ["cat"]


def test_nothing_detected_scores_zero() -> None:
    assert ap([truth([(1, 1, 10, 10)])], [detected([], [])], points="voc07") == 0.0


@pytest.mark.parametrize("points", ["voc07", "voc10"])
def test_ground_truth_as_detections_scores_100(points: Points) -> None:
    random = np.random.default_rng(0)
    truths, detections = [], []
    for _ in range(20):
        low = random.integers(1, 200, (5, 2))
        boxes = np.concatenate([low, low + random.integers(0, 90, (5, 2))], axis=1)
        entry = truth([tuple(box) for box in boxes.tolist()], random.integers(0, 3, 5).tolist())
        truths.append(entry)
        detections.append(Detections(entry.boxes, entry.labels, random.random(5)))
    scores = voc_scores(truths, detections, ["a", "b", "c"], points)
    assert scores.metrics == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def reference_ap(
    truths: list[Truth], detections: list[Detections], label: int, iou: float, points: Points
) -> float:
    """The development kit's loop over one class, in its own inclusive coordinates."""
    claimed: set[tuple[int, int]] = set()
    ranked = [
        (float(score), image, box + np.array([1, 1, 0, 0]))
        for image, found in enumerate(detections)
        for box, score, of in zip(found.boxes, found.scores, found.labels, strict=True)
        if of == label
    ]
    ranked.sort(key=lambda row: -row[0])
    outcomes = []
    for _, image, box in ranked:
        best, best_iou, best_difficult = -1, -np.inf, False
        for number, (edge, of) in enumerate(
            zip(truths[image].boxes, truths[image].labels, strict=True)
        ):
            other = edge + np.array([1, 1, 0, 0])
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            shared = max(width, 0) * max(height, 0)
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
            overlap = shared / (sum(areas) - shared)
            if of == label and overlap > best_iou:
                best, best_iou = number, overlap
                best_difficult = bool(truths[image].difficult[number])
        if best_iou > iou and best_difficult:
            continue
        outcomes.append(best_iou > iou and (image, best) not in claimed)
        if best_iou > iou:
            claimed.add((image, best))
    positives = sum(int(((t.labels == label) & ~t.difficult).sum()) for t in truths)
    if not positives:
        return float("nan")
    right = 0
    curve = []
    for rank, outcome in enumerate(outcomes, 1):
        right += outcome
        curve.append((right / positives, right / rank))
    if points == "voc07":
        tops = [max([p for r, p in curve if r >= t], default=0) for t in np.arange(0, 1.1, 0.1)]
        return sum(tops) / 11
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[number:])
        before = recall
    return area


corner = st.integers(1, 12)
kit_boxes = st.tuples(corner, corner, corner, corner).map(
    lambda b: (b[0], b[1], b[0] + b[2] - 1, b[1] + b[3] - 1)
)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Truth], list[Detections]]:
    """A few images of crowded, overlapping boxes; scores of few values, so that there are ties."""
    truths, detections = [], []
    for _ in range(draw(st.integers(1, 3))):
        objects = draw(st.lists(st.tuples(kit_boxes, st.integers(0, 1), st.booleans()), max_size=4))
        found = draw(
            st.lists(
                st.tuples(kit_boxes, st.integers(0, 1), st.sampled_from([0.2, 0.5, 0.9])),
                max_size=6,
            )
        )
        truths.append(
            truth(
                [box for box, _, _ in objects],
                [label for _, label, _ in objects],
                [n for n, (_, _, difficult) in enumerate(objects) if difficult],
            )
        )
        detections.append(
            detected(
                [box for box, _, _ in found],
                [score for _, _, score in found],
                [label for _, label, _ in found],
            )
        )
    return truths, detections


@settings(max_examples=200)
@given(scene=scenes(), points=st.sampled_from(["voc07", "voc10"]))
def test_equals_a_plain_loop(scene: tuple[list[Truth], list[Detections]], points: Points) -> None:
    truths, detections = scene
    thresholds = np.array([0.3, 0.5, 0.75])
    values = average_precisions(truths, detections, 2, points, thresholds)
    expected = [
        [reference_ap(truths, detections, label, iou, points) for label in range(2)]
        for iou in thresholds
    ]
    np.testing.assert_allclose(values, expected, atol=1e-12)


@st.composite
def lonely_objects(draw: st.DrawFn) -> tuple[list[Truth], list[Detections]]:
    """At most one object per image and class: there COCO's and VOC's matching agree.

    Of an object that is ignored, COCO excuses one detection and VOC any number: there, the later
    ones are left out. The third class has no objects. Detections may be equal, and so may scores.
    """
    truths, detections = [], []
    for _ in range(draw(st.integers(1, 4))):
        labels = draw(st.lists(st.integers(0, 1), unique=True, max_size=2))
        difficult = [n for n in range(len(labels)) if draw(st.booleans())]
        entry = truth([draw(kit_boxes) for _ in labels], labels, difficult)
        found = draw(
            st.lists(st.tuples(kit_boxes, st.integers(0, 2), st.integers(1, 5)), max_size=6)
        )
        found += draw(st.lists(st.sampled_from(found), max_size=2)) if found else []
        excused = {label: n for n, label in enumerate(labels) if n in difficult}
        first = {
            label: max(of_label, key=lambda f: f[2])
            for label in excused
            if (of_label := [f for f in found if f[1] == label])
        }
        kept = [f for f in found if f[1] not in excused] + list(first.values())
        truths.append(entry)
        detections.append(
            detected([b for b, _, _ in kept], [s / 5 for *_, s in kept], [c for _, c, _ in kept])
        )
    return truths, detections


# No IoU of such small boxes equals these, so that > and >= say the same.
UNREACHED = np.array([0.3001, 0.5001, 0.7501])


@settings(max_examples=200)
@given(scene=lonely_objects(), points=st.sampled_from(["voc07", "voc10"]))
def test_equals_pycocotools_where_the_matching_rules_agree(
    scene: tuple[list[Truth], list[Detections]], points: Points
) -> None:
    """Made equal: VOC's recall points or, for the area, every recall that can be reached; no limit
    by size; difficult objects ignored by ordinary IoU (an area outside of every range)."""
    truths, detections = scene
    values = average_precisions(truths, detections, 3, points, UNREACHED)
    expected = coco_values(truths, detections, points)
    np.testing.assert_allclose(values, expected, atol=1e-9)


@st.composite
def objects_apart(draw: st.DrawFn) -> tuple[list[Truth], list[Detections]]:
    """Several objects of a class in an image, no two of which overlap: no detection can then
    overlap two of them by more than half, so that the one it overlaps most, VOC's choice, and the
    best free one, COCO's, are the same. Of detections on a difficult object the first stays."""
    truths, detections = [], []
    for _ in range(draw(st.integers(1, 3))):
        cells = draw(st.lists(st.integers(0, 3), unique=True, max_size=4))
        boxes = [in_cell(draw(kit_boxes), cell) for cell in cells]
        labels = [draw(st.integers(0, 1)) for _ in cells]
        difficult = [n for n in range(len(cells)) if draw(st.booleans()) and draw(st.booleans())]
        box = st.one_of(
            st.builds(in_cell, kit_boxes, st.integers(0, 3)),
            *([st.sampled_from(boxes)] if boxes else []),
        )
        found = draw(st.lists(st.tuples(box, st.integers(0, 2), st.integers(1, 5)), max_size=8))
        entry = truth(boxes, labels, difficult)
        kept: list[tuple[KitBox, int, int]] = []
        excused: set[int] = set()
        for candidate in sorted(found, key=lambda f: -f[2]):
            on = [n for n in difficult if labels[n] == candidate[1]
                  and overlap(candidate[0], boxes[n]) > 0.5]  # fmt: skip
            if not excused.intersection(on):
                kept.append(candidate)
            excused.update(on)
        truths.append(entry)
        detections.append(
            detected([b for b, _, _ in kept], [s / 5 for *_, s in kept], [c for _, c, _ in kept])
        )
    return truths, detections


def in_cell(box: KitBox, cell: int) -> KitBox:
    """Boxes reach to 23 at most."""
    return box[0] + 24 * cell, box[1], box[2] + 24 * cell, box[3]


def overlap(box: KitBox, other: KitBox) -> float:
    """IoU in the kit's inclusive pixels."""
    width = min(box[2], other[2]) - max(box[0], other[0]) + 1
    height = min(box[3], other[3]) - max(box[1], other[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
    return shared / (sum(areas) - shared)


@settings(max_examples=200)
@given(scene=objects_apart(), points=st.sampled_from(["voc07", "voc10"]))
def test_equals_pycocotools_where_objects_do_not_overlap(
    scene: tuple[list[Truth], list[Detections]], points: Points
) -> None:
    """Made equal as above; from an IoU of a half on."""
    truths, detections = scene
    values = average_precisions(truths, detections, 3, points, UNREACHED[1:])
    expected = coco_values(truths, detections, points)[1:]
    np.testing.assert_allclose(values, expected, atol=1e-9)


def coco_values(truths: list[Truth], detections: list[Detections], points: Points) -> np.ndarray:
    """(T, 3) AP of pycocotools, NaN for classes without an object to find."""
    with contextlib.redirect_stdout(io.StringIO()):
        columns = [coco_column(truths, detections, label, points) for label in range(3)]
    return np.stack(columns, axis=1)


def coco_column(
    truths: list[Truth], detections: list[Detections], label: int, points: Points
) -> np.ndarray:
    def row(image: int, box: np.ndarray, category: int) -> dict[str, object]:
        x0, y0, x1, y1 = box.tolist()
        size = [x0, y0, x1 - x0, y1 - y0]
        return {"image_id": image, "category_id": int(category) + 1, "bbox": size}

    objects = [
        {**row(image, box, category), "area": -1 if difficult else 1, "iscrowd": 0}
        for image, entry in enumerate(truths, 1)
        for box, category, difficult in zip(entry.boxes, entry.labels, entry.difficult, strict=True)
    ]
    results = [
        {**row(image, box, category), "score": float(score)}
        for image, entry in enumerate(detections, 1)
        for box, category, score in zip(entry.boxes, entry.labels, entry.scores, strict=True)
    ]
    positives = sum(int((~t.difficult & (t.labels == label)).sum()) for t in truths)
    if not positives or not results:
        return np.full(len(UNREACHED), 0.0 if positives else np.nan)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(1, len(truths) + 1)],
        "categories": [{"id": 1}, {"id": 2}, {"id": 3}],
        "annotations": [{**entry, "id": n} for n, entry in enumerate(objects, 1)],
        "info": {},
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.params.iouThrs = UNREACHED
    reached = np.arange(1, positives + 1) / positives
    evaluation.params.recThrs = RECALL_THRESHOLDS if points == "voc07" else reached
    evaluation.params.catIds = [label + 1]
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"][:, :, 0, 0, 0].mean(axis=1)
    return precision
