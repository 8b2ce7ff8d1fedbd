"""VOC07 classification: AP of a ranking, SVMs, and what difficult objects do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from dupr_cli.errors import UsageError
from dupr_cli.probe.data import open_voc
from dupr_cli.probe.voc_classification import classify, ranking_precision, targets
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe.probe import SvmSection
from tests.support.labelled_scenes import add_image, add_split, annotation_xml


def test_eleven_point_ap_by_hand() -> None:
    # Ranked: right, wrong, right, wrong. Recall 1/2 at precision 1, recall 1 at precision 2/3.
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    points, area = ranking_precision(scores, np.array([1, -1, 1, -1]))
    assert points == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@given(
    wanted=st.lists(st.sampled_from([1, -1]), min_size=2, max_size=60).filter(lambda w: 1 in w),
    seed=st.integers(0, 10**6),
)
def test_area_is_that_of_scikit_learn(wanted: list[int], seed: int) -> None:
    scores = np.random.default_rng(seed).permutation(len(wanted)).astype(float)
    _, area = ranking_precision(scores, np.array(wanted))
    assert area == pytest.approx(metrics.average_precision_score(np.array(wanted) == 1, scores))


@given(
    wanted=st.lists(st.sampled_from([1, -1, 0]), min_size=2, max_size=40).filter(lambda w: 1 in w),
    seed=st.integers(0, 10**6),
)
def test_images_that_do_not_count_might_as_well_not_be_there(wanted: list[int], seed: int) -> None:
    scores = np.random.default_rng(seed).random(len(wanted))
    signs = np.array(wanted)
    counted = signs != 0
    assert ranking_precision(scores, signs) == ranking_precision(scores[counted], signs[counted])


def blobs(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    signs = np.where(random.random(count) < 0.3, 1, -1)
    features = random.normal(size=(count, 6)) + 0.8 * signs[:, None]
    return features / np.linalg.norm(features, axis=1, keepdims=True), signs


def test_svm_is_the_one_that_scikit_learns_grid_search_finds() -> None:
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    train, signs = blobs(0, 90)
    test, test_signs = blobs(1, 60)
    section = SvmSection(costs=[0.001, 0.1, 10.0])
    ours = classify(train, signs, test, test_signs, section, seed=0)
    search = GridSearchCV(
        LinearSVC(class_weight={1: 2, -1: 1}, dual="auto", max_iter=2000, random_state=0),
        {"C": section.costs},
        scoring="average_precision",
        cv=3,
    ).fit(train, signs)
    assert ours.cost == search.best_params_["C"]
    scores = search.decision_function(test)
    expected = metrics.average_precision_score(test_signs == 1, scores)
    assert ours.area == pytest.approx(100 * expected, abs=0.5)


def test_class_without_training_images_has_no_svm_and_no_ap() -> None:
    train, signs = blobs(0, 30)
    score = classify(train, np.full_like(signs, -1), train, signs, SvmSection(), seed=0)
    assert (score.points, score.area, score.cost) == (0.0, 0.0, None)


def test_only_difficult_objects_make_an_image_not_count(tmp_path: Path) -> None:
    objects = [("red", 1, 1, 20, 20), ("green", 30, 1, 50, 20)]
    for image_id in ("easy", "hard"):
        add_image(tmp_path, image_id, objects)
    xml = annotation_xml(objects, difficult=True)
    (tmp_path / "Annotations" / "hard.xml").write_text(xml)
    add_split(tmp_path, "train", ["easy", "hard"])
    images = open_voc(str(tmp_path), "train", SilentReporter())
    rows = targets(images.verdicts, ["blue", "green", "red"])
    assert rows.tolist() == [[-1, 1, 1], [-1, 0, 0]]


def test_class_files_decide_where_they_are_there(tmp_path: Path) -> None:
    for image_id in ("a", "b", "c"):
        add_image(tmp_path, image_id, [("red", 1, 1, 20, 20)])
    add_split(tmp_path, "train", ["a", "b", "c"])
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "red_train.txt").write_text("a  1\nb  0\nc -1\n")
    images = open_voc(str(tmp_path), "train", SilentReporter())
    assert targets(images.verdicts, ["red"])[:, 0].tolist() == [1, 0, -1]
    (lists / "red_train.txt").write_text("a  1\nb  perhaps\n")
    with pytest.raises(UsageError, match=r"red_train\.txt, line 2: the line is 'b  perhaps'"):
        open_voc(str(tmp_path), "train", SilentReporter())
