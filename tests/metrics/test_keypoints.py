"""COCO's AP of keypoints against pycocotools, bit for bit."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dupr_cli.metrics import COCO_SIGMAS, Detections, Truth, score
from dupr_cli.metrics.coco import KEYPOINT_STATISTICS, detections_json, truths_json

CLASSES = ["person", "rider"]


def _objects(
    random: np.random.Generator, count: int, keypoints: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    corners = random.uniform(0, 300, (count, 2))
    sides = random.uniform(10, 200, (count, 2))
    points = np.zeros((count, keypoints, 3))
    points[..., :2] = (
        corners[:, None] + random.uniform(0, 1, (count, keypoints, 2)) * sides[:, None]
    )
    points[..., 2] = random.integers(0, 3, (count, keypoints))
    points[random.random(count) < 0.2, :, 2] = 0  # no keypoint is labelled
    points[points[..., 2] == 0] = 0
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return boxes, random.integers(0, 2, count), points


def _case(seed: int, keypoints: int = 17) -> tuple[list[Truth], list[Detections]]:
    random = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(int(random.integers(1, 5))):
        count = int(random.integers(0, 7))
        boxes, labels, points = _objects(random, count, keypoints)
        crowd = random.random(count) < 0.1
        truths.append(
            Truth(boxes, labels, np.zeros(count, dtype=bool), crowd=crowd, keypoints=points)
        )
        near = points + np.concatenate(
            [random.normal(0, 6, (count, keypoints, 2)), np.ones((count, keypoints, 1))], axis=2
        )
        more, more_labels, elsewhere = _objects(random, int(random.integers(0, 20)), keypoints)
        scores = random.integers(1, 20, count + len(more)) / 20
        detections.append(
            Detections(
                np.concatenate([boxes, more]), np.concatenate([labels, more_labels]), scores,
                keypoints=np.concatenate([near, elsewhere]),
            )
        )  # fmt: skip
    # At least one object of each class, so that both metrics are defined.
    boxes, _, points = _objects(np.random.default_rng([seed, 1]), 2, keypoints)
    points[..., 2] = 2
    truths.append(Truth(boxes, np.array([0, 1]), np.zeros(2, dtype=bool), keypoints=points))
    detections.append(
        Detections(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0),
                   keypoints=np.zeros((0, keypoints, 3)))
    )  # fmt: skip
    return truths, detections


def _official(
    truths: list[Truth], detections: list[Detections], sigmas: Any, category: int | None = None
) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truths_json(truths, CLASSES)
        coco.createIndex()
        rows = detections_json(detections)
        found = coco.loadRes([{k: v for k, v in row.items() if k != "bbox"} for row in rows])
        evaluation = COCOeval(coco, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        if category is not None:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_keypoints_equal_pycocotools_bit_for_bit(seed: int) -> None:
    truths, detections = _case(seed)
    if not any(len(found.labels) for found in detections):
        return  # pycocotools takes no empty results
    scores = score("coco-keypoints", truths, detections, CLASSES)
    for name, value in zip(
        KEYPOINT_STATISTICS, _official(truths, detections, COCO_SIGMAS), strict=True
    ):
        assert scores.metrics.get(f"keypoint_{name}", -100) == 100 * value, name


def test_the_ground_truth_scores_100() -> None:
    truths, _ = _case(3)
    found = []
    for truth in truths:
        assert truth.keypoints is not None
        counts = (truth.keypoints[..., 2] > 0).any(axis=1)
        if truth.crowd is not None:
            counts &= ~truth.crowd
        found.append(
            Detections(
                truth.boxes[counts], truth.labels[counts], np.ones(counts.sum()),
                keypoints=truth.keypoints[counts],
            )
        )  # fmt: skip
    assert score("coco-keypoints", truths, found, CLASSES).metrics["keypoint_AP"] == 100


def test_sigmas_of_each_class() -> None:
    truths, detections = _case(5, keypoints=4)
    sigmas = {"person": [0.02, 0.05, 0.1, 0.2], "rider": [0.2, 0.1, 0.05, 0.02]}
    scores = score("coco-keypoints", truths, detections, CLASSES, sigmas=sigmas)
    expected = [
        _official(truths, detections, sigmas[name], number)[0]
        for number, name in enumerate(CLASSES, 1)
    ]
    assert scores.metrics["keypoint_AP"] == pytest.approx(100 * np.mean(expected))
    alike = score("coco-keypoints", truths, detections, CLASSES, sigmas=sigmas["person"])
    by_name = dict.fromkeys(CLASSES, sigmas["person"])
    again = score("coco-keypoints", truths, detections, CLASSES, sigmas=by_name)
    assert again.metrics["keypoint_AP"] == pytest.approx(alike.metrics["keypoint_AP"])
    assert alike.metrics["keypoint_AP"] != pytest.approx(scores.metrics["keypoint_AP"])


def test_keypoints_are_needed() -> None:
    truths, detections = _case(1)
    without = [Truth(t.boxes, t.labels, t.difficult) for t in truths]
    with pytest.raises(ValueError, match="needs the keypoints"):
        score("coco-keypoints", without, detections, CLASSES)
