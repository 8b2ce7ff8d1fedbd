"""COCO's metric against pycocotools, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dupr_cli.metrics import Detections, Scores, Truth, score
from dupr_cli.metrics.coco import STATISTICS, coco_json_scores, detections_json, truths_json
from tests.support.coco_case import add_masks, draw_coco_case, evaluated_by_pycocotools

IOUS = (0.3, 0.5, 0.62)

Json = dict[str, Any]


def drawn(folder: Path, seed: int) -> tuple[Json, list[Json]]:
    truth, results = draw_coco_case(folder, seed=seed)
    content, rows = json.loads(truth.read_text()), json.loads(results.read_text())
    add_masks(content, rows)
    return content, rows


def expected(content: Json, results: list[Json], kind: str) -> Scores:
    """The figures of pycocotools under our names; undefined ones are left out."""
    main = evaluated_by_pycocotools(content, results, kind)
    more = evaluated_by_pycocotools(content, results, kind, IOUS).eval["precision"]
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows = {}
    for place, category in enumerate(sorted(names)):
        ours, others = main.eval["precision"][:, :, place, 0, -1], more[:, :, place, 0, -1]
        if ours.max() >= 0:
            values = {"AP": ours, "AP50": ours[0], "AP75": ours[5], "AP30": others[0],
                      "AP62": others[2]}  # fmt: skip
            rows[names[category]] = {name: 100 * value.mean() for name, value in values.items()}
    metrics = dict(zip(STATISTICS, 100 * main.stats, strict=True))
    for name in ("AP30", "AP62") if rows else ():
        metrics[name] = np.mean([row[name] for row in rows.values()])
    return Scores({name: value for name, value in metrics.items() if value >= 0}, rows)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_drawn_cases_score_as_in_pycocotools(tmp_path: Path, seed: int, kind: str) -> None:
    """Crowds, all sizes, equal scores, empty images and classes, more than 100 detections."""
    content, results = drawn(tmp_path, seed)
    assert coco_json_scores(content, results, kind, IOUS) == expected(content, results, kind)


@pytest.mark.parametrize("seed", range(20))
def test_few_objects_score_as_in_pycocotools(seed: int) -> None:
    """Curves of one or two detections, whose precision pycocotools rounds in its own way."""
    random = np.random.default_rng(seed)
    truths, found = [], []
    for image in range(int(random.integers(1, 6))):
        count = int(random.integers(image == 0, 3))  # pycocotools needs one detection at least
        corners = random.uniform(0, 50, (count, 2)).round(1)
        boxes = np.concatenate([corners, corners + random.choice([10, 60, 200], (count, 2))], 1)
        labels = random.integers(0, 3, count)
        truths.append(Truth(boxes, labels, random.random(count) < 0.1, random.random(count) < 0.2))
        moved = np.repeat(boxes, 2, axis=0) + random.normal(0, 2, (2 * count, 4))
        scores = random.random(2 * count).round(1)
        found.append(Detections(moved, np.repeat(labels, 2), scores))
    content, results = truths_json(truths, ["a", "b", "c"]), detections_json(found)
    oracle = expected(content, results, "bbox")
    if not oracle.per_class:
        with pytest.raises(ValueError, match="no class has an object to find"):
            score("coco", truths, found, ["a", "b", "c"], IOUS)
    else:
        assert score("coco", truths, found, ["a", "b", "c"], IOUS) == oracle


@pytest.mark.parametrize("objects", [1, 2, 3, 4, 5, 64, 65, 250, 1000])
@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_first_detections_round_as_in_pycocotools(objects: int, right: int) -> None:
    """`right` objects are found before a wrong detection, and one after it."""
    content: Json = {
        "images": [{"id": number} for number in range(1, objects + 1)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 10, 10],
             "area": 100, "iscrowd": 0}
            for number in range(1, objects + 1)
        ],
    }  # fmt: skip
    results = [
        {"image_id": min(number + 1, objects), "category_id": 1, "score": 1 - number / 10,
         "bbox": [500 if number == right else 0, 0, 10, 10]}
        for number in range(right + 2)
    ]  # fmt: skip
    assert coco_json_scores(content, results, "bbox", IOUS) == expected(content, results, "bbox")


def test_ids_may_be_text(tmp_path: Path) -> None:
    """pycocotools sorts them as text; the order of images decides between equal scores."""
    content, results = drawn(tmp_path, 0)
    for row in content["images"]:
        row["id"] = f"image {row['id']}"
    for row in content["annotations"] + results:
        row["image_id"] = f"image {row['image_id']}"
    assert coco_json_scores(content, results, "bbox", IOUS) == expected(content, results, "bbox")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_content_and_results_are_not_changed(tmp_path: Path, kind: str) -> None:
    content, results = drawn(tmp_path, 0)
    before = json.dumps([content, results])
    coco_json_scores(content, results, kind)
    assert json.dumps([content, results]) == before


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_without_detections_all_objects_are_missed(tmp_path: Path, kind: str) -> None:
    """pycocotools refuses an empty list of results, but its definition leaves no doubt."""
    content, _ = drawn(tmp_path, 0)
    scores = coco_json_scores(content, [], kind)
    assert set(scores.metrics.values()) == {0.0}
    assert set(scores.per_class) == {"class 3", "class 7", "class 18"}
