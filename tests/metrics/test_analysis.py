"""What is behind an AP: each kind of error by hand, and against what TIDE's own code counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dupr_cli.datasets.coco import read_coco
from dupr_cli.metrics import Detections, Truth
from dupr_cli.metrics.analysis import ERROR_KINDS, Analysis, analyse, best_score, judge
from dupr_cli.metrics.drawing import write_analysis

Box = tuple[float, float, float, float]
# Objects of one image: a cat and a dog, apart.
CAT, DOG = (0.0, 0.0, 40.0, 40.0), (100.0, 100.0, 140.0, 140.0)


def truth(difficult: tuple[bool, bool] = (False, False)) -> Truth:
    return Truth(np.array([CAT, DOG]), np.array([0, 1]), np.array(difficult))


def found(*rows: tuple[Box, int, float]) -> Detections:
    return Detections(
        np.array([box for box, _, _ in rows]).reshape(-1, 4),
        np.array([label for _, label, _ in rows], dtype=np.int64),
        np.array([score for *_, score in rows]),
    )


def analysed(*rows: tuple[Box, int, float], of: Truth | None = None) -> Analysis:
    return analyse([of or truth()], [found(*rows)], ["cat", "dog"])


def counts(analysis: Analysis) -> dict[str, int]:
    return {kind: error.count for kind, error in analysis.errors.items() if error.count}


def shifted(box: Box, by: float) -> Box:
    return box[0] + by, box[1], box[2] + by, box[3]


BEST = ((CAT, 0, 0.9), (DOG, 1, 0.9))


def test_without_errors() -> None:
    analysis = analysed(*BEST)
    assert counts(analysis) == {}
    assert [error.cost for error in analysis.errors.values()] == [0.0] * len(ERROR_KINDS)
    assert analysis.average_precision == 100
    assert analysis.confusion == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_wrong_class_is_classification_and_its_object_not_missed() -> None:
    analysis = analysed((CAT, 1, 0.9), (DOG, 1, 0.8))
    assert counts(analysis) == {"classification": 1}
    # Now: cats 0, dogs 1 of 2 right. Repaired: both 100.
    assert analysis.average_precision == pytest.approx(25)
    assert analysis.errors["classification"].cost == pytest.approx(75)
    assert analysis.confusion == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_class_without_objects_is_in_no_mean() -> None:
    analysis = analyse([truth()], [found((CAT, 1, 0.9), (DOG, 1, 0.8))], ["cat", "dog", "cow"])
    assert analysis.average_precision == pytest.approx(25)
    assert analysis.errors["classification"].cost == pytest.approx(75)


def test_wrong_class_on_an_object_that_was_found_only_goes() -> None:
    analysis = analysed(*BEST, (CAT, 1, 0.95))
    assert counts(analysis) == {"classification": 1}
    # The dog's detection comes second, behind it: precision 1/2.
    assert analysis.errors["classification"].cost == pytest.approx(25)


def test_repaired_class_does_not_become_a_duplicate() -> None:
    """As a cat it would stand between the two cats that are found, and cost AP."""
    second = (200.0, 0.0, 240.0, 40.0)
    objects = Truth(np.array([CAT, DOG, second]), np.array([0, 1, 0]), np.zeros(3, dtype=np.bool_))
    analysis = analysed(*BEST, (second, 0, 0.3), (CAT, 1, 0.5), of=objects)
    assert counts(analysis) == {"classification": 1}
    assert analysis.errors["classification"].cost == 0


def test_half_an_overlap_is_localisation() -> None:
    box = shifted(CAT, 20)  # IoU 20 / 60
    analysis = analysed((box, 0, 0.9), (DOG, 1, 0.9))
    assert counts(analysis) == {"localisation": 1}
    assert analysis.errors["localisation"].cost == pytest.approx(50)
    assert analysis.confusion == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_of_several_near_misses_the_best_is_repaired() -> None:
    on_nothing = ((200.0, 0.0, 240.0, 40.0), 0, 0.85)
    near = (shifted(CAT, 20), 0, 0.9), (shifted(CAT, -20), 0, 0.8)
    analysis = analysed(*near, on_nothing, (DOG, 1, 0.9))
    assert counts(analysis) == {"localisation": 2, "background": 1}
    # With the other one repaired the cat would come second: 25.
    assert analysis.errors["localisation"].cost == pytest.approx(50)


def test_kinds_are_repaired_one_at_a_time() -> None:
    """Two kinds of errors about one object: each repair finds it. TIDE's own code lets the better
    scored of both repairs find it, and the other none; its paper repairs one kind, others stay."""
    analysis = analysed((shifted(CAT, 20), 0, 0.9), (CAT, 1, 0.8), (DOG, 1, 0.95))
    assert counts(analysis) == {"classification": 1, "localisation": 1}
    assert analysis.errors["localisation"].cost == pytest.approx(50)
    # The cat is found by the second of two cats.
    assert analysis.errors["classification"].cost == pytest.approx(25)


def test_half_an_overlap_with_another_class_is_both() -> None:
    analysis = analysed(*BEST, (shifted(CAT, 20), 1, 0.95))
    assert counts(analysis) == {"both": 1}
    assert analysis.errors["both"].cost == pytest.approx(25)


def test_second_detection_of_an_object_is_duplicate_and_no_confusion() -> None:
    analysis = analysed((CAT, 0, 0.9), (CAT, 0, 0.85), (DOG, 1, 0.9))
    assert counts(analysis) == {"duplicate": 1}
    assert analysis.errors["duplicate"].cost == 0  # it comes after the last right one
    assert analysis.confusion == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_detection_on_nothing_is_background() -> None:
    analysis = analysed(*BEST, ((200.0, 0.0, 240.0, 40.0), 0, 0.95))
    assert counts(analysis) == {"background": 1}
    assert analysis.errors["background"].cost == pytest.approx(25)
    assert analysis.confusion == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("shift", "kind"), [(32, "localisation"), (33, "background")])
def test_background_begins_below_a_tenth(shift: float, kind: str) -> None:
    """IoU 8 / 72 = 0.111 and 7 / 73 = 0.096."""
    assert kind in counts(analysed((shifted(CAT, shift), 0, 0.9), (DOG, 1, 0.9)))


def test_object_that_nothing_is_near_is_missed() -> None:
    analysis = analyse([truth(), truth()], [found(*BEST), found((DOG, 1, 0.9))], ["cat", "dog"])
    assert counts(analysis) == {"missed": 1}
    assert analysis.errors["missed"].cost == pytest.approx(25)
    assert analysis.confusion == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]


def test_difficult_objects_are_no_errors() -> None:
    analysis = analysed((DOG, 1, 0.9), of=truth((True, False)))
    assert counts(analysis) == {}
    assert analysis.confusion == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    on_difficult = analysed((CAT, 0, 0.9), (DOG, 1, 0.9), of=truth((True, False)))
    assert counts(on_difficult) == {}
    assert on_difficult.confusion == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_wrong_class_on_a_difficult_object_is_background() -> None:
    """VOC counts it as wrong, and it is about no object that is to be found."""
    analysis = analysed((CAT, 1, 0.95), (DOG, 1, 0.9), of=truth((True, False)))
    assert counts(analysis) == {"background": 1}


def test_confusion_gives_an_object_to_the_best_score() -> None:
    analysis = analysed((CAT, 1, 0.8), *BEST)
    assert analysis.confusion == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_confusion_gives_a_detection_the_object_it_overlaps_most() -> None:
    low = (0.0, 0.0, 40.0, 36.0)  # IoU 0.9 with the cat
    objects = Truth(np.array([CAT, low]), np.array([0, 1]), np.zeros(2, dtype=np.bool_))
    assert analysed((low, 1, 0.9), of=objects).confusion == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_confusion_leaves_out_low_scores() -> None:
    low = analysed((CAT, 0, 0.49), (DOG, 1, 0.5))
    assert low.confusion == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert counts(low) == {}


def test_sizes_ignore_the_others() -> None:
    """The cat is 40 x 40, medium; a small object is added that is not found, and a large find."""
    small = (300.0, 0.0, 310.0, 10.0)
    objects = Truth(np.array([CAT, small]), np.array([0, 0]), np.array([False, False]))
    analysis = analyse(
        [objects], [found((CAT, 0, 0.5), ((0.0, 200.0, 200.0, 400.0), 0, 0.9))], ["cat"]
    )
    assert analysis.sizes["small"].AP == 0
    assert analysis.sizes["medium"].AP == 100
    assert analysis.sizes["large"].AP is None
    assert [size.objects for size in analysis.sizes.values()] == [1, 1, 0]
    assert analysis.average_precision == pytest.approx(25)


def test_sizes_are_those_of_coco_without_difficult_objects() -> None:
    sides = np.array([31.0, 32.0, 95.0, 96.0, 31.0])
    boxes = np.stack([np.zeros(5), np.zeros(5), sides, sides], axis=1)
    objects = Truth(boxes, np.zeros(5, dtype=np.int64), np.array([False] * 4 + [True]))
    sizes = analyse([objects], [found()], ["cat"]).sizes
    assert {name: size.objects for name, size in sizes.items()} == {
        "small": 1,
        "medium": 2,
        "large": 1,
    }


def test_curve_is_of_the_class() -> None:
    analysis = analysed((CAT, 0, 0.8), ((200.0, 0.0, 240.0, 40.0), 0, 0.9), (DOG, 1, 0.7))
    curve = analysis.curves["cat"]
    assert (curve.precision, curve.recall, curve.scores) == ([0.5], [1.0], [0.8])
    assert analysis.curves["dog"].precision == [1.0]


def test_no_object_to_find_is_refused() -> None:
    with pytest.raises(ValueError, match="no class has an object to find"):
        analysed(*BEST, of=truth((True, True)))


def test_counts_are_those_of_tide(shared_data: Path) -> None:
    """Counted by tidecv 1.0.1 on the same files. Its AP of 64.2 has classes without objects in the
    mean, as 0; COCO's own AP50 of 69.7 has not, so the costs differ."""
    case = shared_data / "metric_cases" / "coco_val2014_100"
    coco = read_coco(case / "instances_val2014_100.json")
    rows = json.loads((case / "instances_val2014_fakebbox100_results.json").read_text())
    numbers = {category: number for number, category in enumerate(coco.categories)}
    truths, detections = [], []
    for image in coco.images:
        boxes = image.objects
        truths.append(
            Truth(
                np.array([b.corners for b in boxes], dtype=np.float64).reshape(-1, 4),
                np.array([coco.classes.index(b.name) for b in boxes], dtype=np.int64),
                np.zeros(len(boxes), dtype=np.bool_),
                np.array([b.crowd for b in boxes], dtype=np.bool_),
            )
        )
        of_image = [row for row in rows if row["image_id"] == image.id]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in of_image)]
        detections.append(
            Detections(
                np.array(corners).reshape(-1, 4),
                np.array([numbers[row["category_id"]] for row in of_image], dtype=np.int64),
                np.array([row["score"] for row in of_image], dtype=np.float64),
            )
        )
    analysis = analyse(truths, detections, coco.classes)
    assert {kind: error.count for kind, error in analysis.errors.items()} == {
        "classification": 83,
        "localisation": 1,
        "both": 0,
        "duplicate": 1,
        "background": 0,
        "missed": 97,
    }


def many_errors() -> tuple[list[Truth], list[Detections]]:
    """30 images of up to five objects in cells of a grid, four classes, every kind of error."""
    random = np.random.default_rng(0)
    truths, detections = [], []
    for _ in range(30):
        count = int(random.integers(1, 6))
        corners = 100.0 * np.stack(np.divmod(random.permutation(9)[:count], 3), axis=1)[:, ::-1]
        sides = random.integers(60, 90, (count, 2))
        boxes, labels = np.hstack([corners, corners + sides]), random.integers(0, 4, count)
        near = random.integers(0, count, int(random.integers(1, 15)))
        moved = boxes[near] + random.normal(0, 1, (len(near), 4)) * random.choice(
            [2, 15, 40], (len(near), 1)
        )
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 5)
        moved[random.random(len(near)) < 0.2] += 1000
        same = random.random(len(near)) < 0.6
        found_as = np.where(same, labels[near], random.integers(0, 4, len(near)))
        truths.append(Truth(boxes, labels, np.zeros(count, dtype=np.bool_)))
        detections.append(Detections(moved, found_as, random.random(len(near))))
    return truths, detections


def test_many_errors_are_those_of_tide() -> None:
    """As tidecv 1.0.1 has them. Its AP is at 101 points of recall, which moves a cost by 0.2 or so;
    classification and localisation it repairs together, see above."""
    analysis = analyse(*many_errors(), ["a", "b", "c", "d"])
    assert {kind: error.count for kind, error in analysis.errors.items()} == {
        "classification": 28,
        "localisation": 40,
        "both": 13,
        "duplicate": 22,
        "background": 42,
        "missed": 35,
    }
    costs = {"both": 1.144, "duplicate": 0.567, "background": 3.297, "missed": 8.426}
    for kind, cost in costs.items():
        assert analysis.errors[kind].cost == pytest.approx(cost, abs=0.3), kind


def test_verdicts_are_what_is_counted() -> None:
    """Detections in the order of a file are judged in the order of their images."""
    truths, detections = many_errors()
    listed = sum(len(each.labels) for each in detections)
    order = np.random.default_rng(1).permutation(listed)
    ends = np.cumsum([len(each.labels) for each in detections])[:-1]
    shuffled = [
        replace(each, order=places)
        for each, places in zip(detections, np.split(order, ends), strict=True)
    ]
    classes = 1 + max(int(label) for t in truths for label in t.labels)
    judged = judge(truths, shuffled, classes)
    kinds = Counter(kind for each in judged for kind in each.kinds)
    names = [f"class {number}" for number in range(classes)]
    counted = counts(analyse(truths, detections, names))
    counted.pop("missed", None)
    assert {kind: kinds[kind] for kind in counted} == counted
    for truth, each, verdict in zip(truths, detections, judged, strict=True):
        found = verdict.finds[verdict.finds >= 0]
        assert len(set(found.tolist())) == len(found) == verdict.kinds.count("right")
        assert (truth.labels[found] == each.labels[verdict.finds >= 0]).all()


def test_lower_scores_change_no_verdict() -> None:
    truths, detections = many_errors()
    whole = judge(truths, detections, 10)
    kept = [np.flatnonzero(each.scores >= 0.5) for each in detections]
    confident = [
        Detections(each.boxes[places], each.labels[places], each.scores[places])
        for each, places in zip(detections, kept, strict=True)
    ]
    for part, every, places in zip(judge(truths, confident, 10), whole, kept, strict=True):
        assert part.kinds == [every.kinds[i] for i in places]


def test_the_best_score_is_that_of_the_best_f1() -> None:
    truths, detections = many_errors()
    judged = judge(truths, detections, 10)
    objects = sum(int(np.count_nonzero(~truth.difficult)) for truth in truths)

    def f1(score: float) -> float:
        kinds = [
            kind for each, verdict in zip(detections, judged, strict=True)
            for kind, value in zip(verdict.kinds, each.scores, strict=True) if value >= score
        ]  # fmt: skip
        counted = sum(kind != "ignored" for kind in kinds)
        return 2 * kinds.count("right") / (counted + objects)

    found = best_score(judged, detections, objects)
    tried = [f1(float(score)) for each in detections for score in each.scores]
    assert f1(found) == pytest.approx(max(tried))


def test_without_a_right_detection_the_best_score_leaves_as_many_as_objects() -> None:
    away = (300.0, 300.0, 320.0, 320.0)
    wrong = [found((away, 0, 0.9), (away, 0, 0.8), (away, 1, 0.7))]
    assert best_score(judge([truth()], wrong, 2), wrong, 2) == 0.8
    assert best_score(judge([truth()], [found()], 2), [found()], 2) == float("inf")


def test_files_of_an_analysis(tmp_path: Path) -> None:
    write_analysis(tmp_path, analysed((CAT, 1, 0.9), (DOG, 1, 0.8)))
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["errors"]["classification"]["count"] == 1
    for name in ("precision_recall.png", "confusion.png", "errors.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200
