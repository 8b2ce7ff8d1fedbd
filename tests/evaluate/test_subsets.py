"""Few labels: draws keep the classes' shares, are repeatable, stored, and read back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.datasets.labelled import Annotation, LabelledSet, open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.subsets import choose_labels, stratified
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from tests.support.labelled_scenes import make_tree


def annotation(names: list[str]) -> Annotation:
    count = len(names)
    flags = np.zeros(count, dtype=np.bool_)
    boxes = np.tile(np.array([[0, 0, 9, 9]], dtype=np.float32), (count, 1))
    return Annotation("x", 10, 10, boxes, tuple(names), flags, flags, np.full(count, 81.0))


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3), min_size=1, max_size=60),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_a_draw_has_the_size_asked_for_and_no_image_twice(
    images: list[list[str]], count: int, seed: int
) -> None:
    annotations = [annotation(names) for names in images]
    count = min(count, len(images))
    drawn = stratified(annotations, count, seed)
    assert len(drawn) == len(set(drawn)) == count
    assert drawn == stratified(annotations, count, seed)
    classes = {name for names in images for name in names}
    if count >= 3 * len(classes):  # room for every class, whatever images they share
        assert {name for i in drawn for name in images[i]} == classes


def test_classes_keep_their_shares() -> None:
    names = [["a"]] * 600 + [["b"]] * 300 + [["c"]] * 90 + [["d"]] * 10
    drawn = stratified([annotation(n) for n in names], 100, 0)
    assert Counter(names[i][0] for i in drawn) == {"a": 60, "b": 30, "c": 9, "d": 1}


def test_a_random_draw_has_the_objects_of_the_population() -> None:
    """A stratified draw of few images prefers those with many classes; published draws do not."""
    random = np.random.default_rng(1)
    names = [["a"] * int(n) + (["bcdefgh"[i % 7]] if i % 40 == 0 else []) for i, n in
             enumerate(random.integers(1, 6, 4000))]  # fmt: skip
    for i in range(0, 4000, 40):
        names[i] = [*names[i], *"bcdefgh"]
    images = cast(LabelledSet, SimpleNamespace(annotations=[annotation(n) for n in names]))
    means = {
        draw: np.mean(
            [
                len(names[i])
                for seed in range(20)
                for i in choose_labels(
                    images, data(labels=40, labels_draw=draw, labels_seed=seed).data
                )
            ]
        )
        for draw in ("random", "stratified")
    }
    population = np.mean([len(n) for n in names])
    assert means["random"] == pytest.approx(population, abs=0.25)
    assert means["stratified"] > population


def data(**keys: object) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate({"data": keys})


def test_shares_counts_and_files_of_labels(tmp_path: Path) -> None:
    images = open_labelled(str(make_tree(tmp_path / "t", train=20)), ["train"], SilentReporter())
    share = choose_labels(images, data(labels="25%").data)
    assert share == choose_labels(images, data(labels=5).data)
    assert len(share) == 5
    assert share != choose_labels(images, data(labels=5, labels_seed=1).data)
    stored = tmp_path / "labels.json"
    stored.write_text(json.dumps({"image_ids": [images.ids[i] for i in share]}))
    assert choose_labels(images, data(labels=str(stored)).data) == share


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{}", "not a list of labelled images"), ('{"image_ids": ["no"]}', "1 of its 1 images")],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, content: str, problem: str) -> None:
    images = open_labelled(str(make_tree(tmp_path / "t")), ["train"], SilentReporter())
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UsageError, match=problem):
        choose_labels(images, data(labels=str(tmp_path / "labels.json")).data)
