"""Labels saved: the crossing of curves, its interval, and the whole comparison."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dupr_cli import evaluate
from dupr_cli.artifacts.label_curves import CurvePoint, LabelCurves, LabelsNeeded
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.label_curves import crossing, draw, labels_needed, legend_titles
from dupr_cli.recipe import EvaluateRecipe
from tests.support.command_line import dupr
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import frozen_recipe
from tests.support.reporters import Listening
from tests.support.weights import random_weights

COUNTS = [50, 100, 200, 400]


def points(values: list[list[float]]) -> list[CurvePoint]:
    return [
        CurvePoint(count, float(np.mean(of)), 0.0, 0.0, dict(enumerate(of)))
        for count, of in zip(COUNTS, values, strict=True)
    ]


def test_a_curve_that_doubles_its_labels_needs_half() -> None:
    """With AP = 10 log2(n), a start that is 10 better needs half the labels at every number."""
    base = points([[10 * math.log2(n)] * 3 for n in COUNTS])
    better = points([[10 * math.log2(n) + 10] * 3 for n in COUNTS])
    found = labels_needed({"none": base, "ours": better}, "none")
    assert [row.beyond for row in found] == ["less", "", "", ""]
    assert [row.needed for row in found[1:]] == pytest.approx([50, 100, 200])
    worse = labels_needed({"none": better, "ours": base}, "none")
    assert [row.beyond for row in worse] == ["", "", "", "more"]
    assert [row.needed for row in worse[:3]] == pytest.approx([100, 200, 400])


@given(
    st.lists(st.floats(1, 99), min_size=4, max_size=4, unique=True),
    st.floats(0, 1),
    st.integers(0, 2),
)
def test_the_crossing_is_on_the_curve(values: list[float], share: float, segment: int) -> None:
    means = np.array(sorted(values))
    target = float(means[segment] + share * (means[segment + 1] - means[segment]))
    found = crossing(COUNTS, means, target)
    at = np.interp(math.log(found), np.log(COUNTS), means)
    assert at == pytest.approx(target, rel=1e-6)


def test_beyond_both_ends() -> None:
    means = np.array([5.0, 6.0, 7.0, 8.0])
    assert crossing(COUNTS, means, 4.0) == 0
    assert crossing(COUNTS, means, 5.0) == 50
    assert crossing(COUNTS, means, 9.0) == math.inf


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int) -> None:
    """Seeds scatter around a known curve; 95 % intervals must contain the true number of labels."""
    random, hits, trials = np.random.default_rng(0), 0, 100
    for _ in range(trials):
        heights = np.array([[5 * math.log2(n / 25)] * seeds for n in COUNTS])
        base = heights + random.normal(0, 1, (4, seeds))
        ours = base + 3 + random.normal(0, 1, (4, seeds))
        curves = {"none": points(base.tolist()), "ours": points(ours.tolist())}
        (row,) = [
            r for r in labels_needed(curves, "none") if r.baseline_labels == 200
        ]  # fmt: skip
        truth = 200 / 2 ** (3 / 5)
        low, high = row.low or 0.0, row.high or math.inf
        hits += low <= truth <= high
    assert hits / trials >= 0.9


def test_bounds_outside_the_tried_numbers_are_absent() -> None:
    base = points([[10.0, 10.5, 9.5]] * 4)
    worse = points([[5.0, 5.5, 4.5]] * 4)
    for names in ((base, worse), (worse, base)):
        found = labels_needed(dict(zip(("none", "ours"), names, strict=True)), "none")
        assert all((row.needed, row.low, row.high) == (None, None, None) for row in found)
    two = {"none": points([[10.0, 10.5]] * 4), "ours": points([[9.9, 11.0]] * 4)}
    assert all((row.low, row.high) == (None, None) for row in labels_needed(two, "none"))


def recipe(labels: list[object], trials: int = 2) -> EvaluateRecipe:
    plain = frozen_recipe()
    data = {**plain.data.model_dump(), "labels": labels}
    return EvaluateRecipe.model_validate({**plain.model_dump(), "data": data, "trials": trials})


@pytest.mark.slow
def test_the_whole_comparison(tmp_path: Path) -> None:
    tree, out = make_tree(tmp_path / "tree"), tmp_path / "out"
    weights = random_weights(tmp_path / "backbone.safetensors")
    reporter = Listening()
    found = evaluate.run_labels(
        recipe(["all", 4]), [str(weights), "none"], str(tree), out, device="cpu", reporter=reporter
    )
    assert LabelCurves.read(out) == found
    assert found.baseline == "02-none"
    assert [p.labels for p in found.curves["AP"]["01-backbone"]] == [4, 8]
    assert found.folders == {4: "labels-4", 8: "labels-8"}
    # Features were computed once for each of the weights, and are not kept.
    assert len([line for line in reporter.said if line.startswith("test features")]) == 2
    assert not list((out / "features").glob("*"))
    for count, folder in found.folders.items():
        results = json.loads((out / folder / "results.json").read_text())
        assert results["train"]["images"] == count
        means = [entry["metrics"]["AP"] for entry in results["results"]]
        assert means == [
            next(p.mean for p in found.curves["AP"][name] if p.labels == count)
            for name in ("01-backbone", "02-none")
        ]
    rows = list(csv.DictReader(io.StringIO((out / "labels-saved.csv").read_text())))
    assert len(rows) == 2 * 2 * 2
    text = (out / "labels-saved.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "Labels needed for the AP of 02-none" in text
    assert "\\bottomrule" in (out / "labels-saved.tex").read_text()
    assert Image.open(out / "labels-saved.png").width > 600

    done = dupr("evaluate", "report", out, "--json")
    (group,) = json.loads(done.stdout)["groups"]
    assert [row["labels"] for row in group] == [4, 4, 8, 8]

    # One more number of labels runs alone; the others are reused.
    reporter = Listening()
    more = evaluate.run_labels(
        recipe([4, 6, "all"]), [str(weights), "none"], str(tree), out, device="cpu",
        reporter=reporter, baseline=str(weights),
    )  # fmt: skip
    assert more.baseline == "01-backbone"
    assert len([line for line in reporter.said if line.startswith("train ")]) == 4
    assert more.curves["AP"]["02-none"][0] == found.curves["AP"]["02-none"][0]

    (out / "notes").write_text("mine")
    again = evaluate.run_labels(
        recipe([4, 6], 1), ["none"], str(tree), out, device="cpu", overwrite=True
    )
    assert [p.labels for p in again.curves["AP"]["01-none"]] == [4, 6]
    assert not (out / "labels-8").exists()
    assert (out / "notes").read_text() == "mine"


def test_wrong_lists_say_what_to_do(tmp_path: Path) -> None:
    tree, out = make_tree(tmp_path / "tree"), tmp_path / "out"
    common = ("--frozen", "--data", tree, "--out", out, "--set", "detector.backbone=resnet18")
    done = dupr("evaluate", "voc", "none", *common, "--labels", "8,all", code=2)
    assert "like another number of the list" in done.stderr
    done = dupr("evaluate", "voc", "none", *common, "--labels", "4,many", code=2)
    assert "data.labels" in done.stderr
    done = dupr(
        "evaluate", "voc", "none", *common, "--labels", "4,all", "--baseline", "runs/x", code=2
    )
    assert "not among the compared weights" in done.stderr
    assert not list(out.glob("*")) if out.exists() else True
    with pytest.raises(UsageError, match="run_labels"):
        evaluate.run(recipe([4, "all"]), ["none"], str(tree), out)
    with pytest.raises(UsageError, match="no list"):
        evaluate.run_labels(frozen_recipe(), ["none"], str(tree), out)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels-saved.json").write_text("{")
    with pytest.raises(UsageError, match=r"labels-saved\.json.*--labels"):
        LabelCurves.read(tmp_path)


def test_legends_name_what_was_compared() -> None:
    weights = {
        "01-drones": "runs/drones", "02-none": "none", "03-a": "one/same", "04-b": "two/same",
        "05-long": f"runs/{'x' * 60}",
    }  # fmt: skip
    titles = legend_titles(weights)
    assert [titles[name] for name in ("01-drones", "02-none")] == ["drones", "random weights"]
    assert [titles[name] for name in ("03-a", "04-b")] == ["03-a", "04-b"]  # ends that are equal
    assert len(titles["05-long"]) == 32


def test_intervals_are_drawn_within_the_range_of_percents(tmp_path: Path) -> None:
    assert CurvePoint(50, 1.0, -4.0, 6.0, {}).band == (0.0, 6.0)
    assert CurvePoint(50, 97.0, 88.0, 106.0, {}).band == (88.0, 100.0)
    low, high = CurvePoint(50, 1.0, -4.0, 6.0, {0: 1.0}), CurvePoint(99, 9.0, 5.0, 13.0, {0: 9.0})
    for metrics in (["AP"], ["AP", "AP50"]):
        curves = {name: {"none": [low, high]} for name in metrics}
        saved: dict[str, list[LabelsNeeded]] = {name: [] for name in metrics}
        draw(
            tmp_path / "curves.png",
            LabelCurves("p", "AP", "none", 0.95, {"none": "none"}, curves, saved, {}, 9, [0], []),
        )
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.width > 1000
