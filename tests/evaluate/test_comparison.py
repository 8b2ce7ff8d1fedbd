"""`dupr_cli.evaluate.run` end to end, on scenes of a few rectangles and a few iterations."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dupr_cli import evaluate
from dupr_cli.artifacts.results import Results
from dupr_cli.artifacts.weights import WeightsMetadata, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe import EvaluateRecipe
from tests.support.labelled_scenes import COLOURS, make_tree
from tests.support.recipes import detection_recipe as recipe
from tests.support.reporters import Listening

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("set") / "tree")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.25,) * 3, 64)
    write_weights(path, ResNetBackbone("resnet18").state_dict(), metadata)
    return path


@pytest.fixture(scope="module")
def finished(
    tree: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results]:
    """OUT of one comparison of weights and none, and what `run` returned."""
    out = tmp_path_factory.mktemp("out") / "eval"
    return out, evaluate.run(recipe(), [str(weights), "none"], str(tree), out, device="cpu")


def test_results_say_what_was_measured(finished: tuple[Path, Results], weights: Path) -> None:
    out, results = finished
    assert [entry.weights for entry in results.results] == [str(weights), "none"]
    assert [entry.architecture for entry in results.results] == ["resnet18", "resnet18"]
    assert results.metric.startswith("VOC07 11-point AP")
    assert results.classes == sorted(COLOURS)
    assert (results.train.images, results.test.images) == (8, 4)
    for entry in results.results:
        assert set(entry.metrics) == {"AP", "AP50", "AP75"}
        assert all(math.isfinite(value) for value in entry.metrics.values())
    assert Results.read(out) == results


def test_every_output_is_there(finished: tuple[Path, Results]) -> None:
    out, _ = finished
    table = (out / "table.txt").read_text()
    assert max(len(line) for line in table.splitlines()) <= 80
    assert all(name in table for name in ("01-backbone", "02-none", *COLOURS))
    for name in ("detections.png", "curves.png"):
        assert Image.open(out / name).width > 600
    rows = json.loads((out / "02-none" / "seed-0" / "detections.json").read_text())
    assert set(rows[0]) == {"image_id", "name", "score", "box"}
    assert not list(out.rglob("*.tmp"))


def test_finished_weights_are_not_run_again(
    finished: tuple[Path, Results], weights: Path, tree: Path
) -> None:
    out, before = finished
    (out / "results.json").unlink()  # as if it had been killed before the end
    reporter = Listening()
    again = evaluate.run(
        recipe(), [str(weights), "none"], str(tree), out, device="cpu", reporter=reporter
    )
    assert again == before
    assert sum("finished before" in line for line in reporter.said) == 2
    assert not any(line.startswith("train") for line in reporter.said)


def test_weights_that_were_added_are_run_alone(
    finished: tuple[Path, Results], weights: Path, tree: Path
) -> None:
    out, before = finished
    reporter = Listening()
    addresses = [str(weights), "none", "none"]
    results = evaluate.run(recipe(), addresses, str(tree), out, device="cpu", reporter=reporter)
    trained = [line for line in reporter.said if line.startswith("train")]
    assert trained == ["train 03-none"]
    # Paired and deterministic: the same weights under another name give the same AP.
    assert results.results[2].metrics == before.results[1].metrics


def test_another_recipe_is_refused(
    finished: tuple[Path, Results], weights: Path, tree: Path
) -> None:
    out, _ = finished
    with pytest.raises(UsageError, match=r"(?s)train.iterations: 2 there, 3 now.*--overwrite"):
        evaluate.run(recipe(3), [str(weights), "none"], str(tree), out, device="cpu")


def test_keys_that_do_not_change_the_result_may_change(
    finished: tuple[Path, Results], weights: Path, tree: Path
) -> None:
    out, before = finished
    operational = recipe()
    train = operational.train.model_copy(update={"log_every": 1})
    same = operational.model_copy(update={"train": train})
    results = evaluate.run(same, [str(weights)], str(tree), out, device="cpu")
    assert results.results == before.results[:1]


def test_other_weights_in_the_same_place_are_refused(
    finished: tuple[Path, Results], tree: Path, tmp_path: Path
) -> None:
    out, _ = finished
    other = tmp_path / "backbone.safetensors"
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.25,) * 3, 64)
    write_weights(other, ResNetBackbone("resnet18").state_dict(), metadata)
    with pytest.raises(UsageError, match=r"01-backbone.*belongs to other weights.*--overwrite"):
        evaluate.run(recipe(), [str(other)], str(tree), out, device="cpu")


def test_overwrite_replaces_an_evaluation_but_nothing_else(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    small = recipe(1, detector={**recipe().detector.model_dump(), "backbone": "resnet18"})
    evaluate.run(small, ["none"], str(tree), out, device="cpu")
    (out / "notes.txt").write_text("mine")
    for name in ("2024-notes", "01-none/seed-0"):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "notes.txt").write_text("mine")
    reseeded = small.model_copy(update={"seed": 1})
    results = evaluate.run(reseeded, ["none"], str(tree), out, device="cpu", overwrite=True)
    assert results.seeds == [1]
    assert not (out / "01-none" / "seed-0" / "result.json").exists()
    assert len(list(out.rglob("notes.txt"))) == 3


def test_folder_with_other_things_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no evaluation"):
        evaluate.run(recipe(), ["none"], str(tree), tmp_path, device="cpu", overwrite=True)


def test_weights_of_another_architecture_than_the_recipe_are_refused(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    fixed = recipe(detector={"backbone": "resnet50"})
    with pytest.raises(UsageError, match=r"resnet18.*resnet50.*detector\.backbone"):
        evaluate.plan(fixed, [str(weights)], str(tree), tmp_path / "eval")


def test_plan_states_the_facts_and_writes_nothing(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    plan = evaluate.plan(recipe(8), [str(weights), "none"], str(tree), tmp_path / "eval")
    assert plan.architectures == ["resnet18", "resnet18"]
    assert (plan.train_images, plan.test_images, plan.epochs) == (8, 4, 2.0)
    assert list(tmp_path.iterdir()) == []


def test_none_alone_is_a_resnet50(tree: Path, tmp_path: Path) -> None:
    plan = evaluate.plan(recipe(), ["none"], str(tree), tmp_path / "eval")
    assert plan.architectures == ["resnet50"]


def test_class_of_the_test_split_only_is_reported_and_counted(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    annotation = tree / "Annotations" / "img010.xml"
    annotation.write_text(annotation.read_text().replace("green", "violet"))
    small = recipe(1, detector={**recipe().detector.model_dump(), "backbone": "resnet18"})
    reporter = Listening()
    results = evaluate.run(
        small, ["none"], str(tree), tmp_path / "eval", device="cpu", reporter=reporter
    )
    assert "violet" in results.classes
    assert results.results[0].per_class["violet"]["AP"] == 0
    assert any("violet" in line and "val only" in line for line in reporter.said)


def test_images_of_both_splits_are_reported(tree: Path, tmp_path: Path) -> None:
    reporter = Listening()
    small = recipe(
        1,
        detector={**recipe().detector.model_dump(), "backbone": "resnet18"},
        data={**recipe().data.model_dump(), "test_splits": ["train"]},
    )
    evaluate.run(
        small,
        ["none"],
        str(tree),
        tmp_path / "eval",
        device="cpu",
        reporter=reporter,
    )
    assert any("8 images" in line and "trained on" in line for line in reporter.said)


def test_failure_ends_the_process_although_workers_are_busy(tree: Path, tmp_path: Path) -> None:
    """An error keeps the loader alive to the end of the process, which must not wait for it."""
    diverging = recipe().model_dump(mode="json")
    diverging["detector"]["backbone"] = "resnet18"
    diverging["train"] |= {"iterations": 50, "lr": 1e12, "workers": 1}
    script = f"""
from pathlib import Path
from dupr_cli import evaluate
from dupr_cli.recipe import EvaluateRecipe
recipe = EvaluateRecipe.model_validate({diverging!r})
evaluate.run(recipe, ["none"], {str(tree)!r}, Path({str(tmp_path / "eval")!r}), device="cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "training has diverged" in done.stderr


def small(**overrides: object) -> EvaluateRecipe:
    detector = {**recipe().detector.model_dump(), "backbone": "resnet18"}
    return recipe(1, detector=detector, **overrides)


def test_trials_give_deviations_and_paired_differences(
    tree: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    two = small().model_copy(update={"trials": 2})
    results = evaluate.run(two, [str(weights), "none"], str(tree), out, device="cpu")
    assert results.seeds == [0, 1]
    (first, second) = results.results[0].trials
    mean = (first.metrics["AP"] + second.metrics["AP"]) / 2
    assert results.results[0].metrics["AP"] == pytest.approx(mean)
    assert set(results.results[0].deviations) >= {"AP", "AP50", "AP75"}
    (ap, _, _) = results.differences
    assert (ap.first, ap.second, ap.metric) == ("01-backbone", "02-none", "AP")
    assert ap.low <= ap.mean <= ap.high
    table = (out / "table.txt").read_text()
    assert "01-backbone minus 02-none" in table
    assert max(map(len, table.splitlines())) <= 80

    # One seed more: those that are there are used again.
    reporter = Listening()
    three = two.model_copy(update={"trials": 3})
    more = evaluate.run(
        three, [str(weights), "none"], str(tree), out, device="cpu", reporter=reporter
    )
    assert [line for line in reporter.said if line.startswith("train")] == [
        "train 01-backbone seed 2",
        "train 02-none seed 2",
    ]
    assert more.results[0].trials[:2] == results.results[0].trials


def test_few_labels_are_stored(tree: Path, tmp_path: Path) -> None:
    few = small(data={**recipe().data.model_dump(), "labels": 3})
    results = evaluate.run(few, ["none"], str(tree), tmp_path / "eval", device="cpu")
    stored = json.loads((tmp_path / "eval" / "labels.json").read_text())
    assert results.train.images == len(stored["image_ids"]) == 3


def test_checkpoints_of_a_finished_trial_do_not_outlive_a_kill(tree: Path, tmp_path: Path) -> None:
    """The fault behind this: killed between its result and their removal, they stayed for ever."""
    out = tmp_path / "eval"
    before = evaluate.run(small(), ["none"], str(tree), out, device="cpu")
    checkpoints = out / "01-none" / "seed-0" / "checkpoints"
    for name in ("step-00000001", f".step-00000002.{2**22}.tmp"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").write_bytes(b"0")
    after = evaluate.run(small(), ["none"], str(tree), out, device="cpu")
    assert after.results[0].metrics == before.results[0].metrics
    assert not checkpoints.exists()


def test_what_differs_from_the_named_protocol_is_said(tree: Path, tmp_path: Path) -> None:
    changed = small(name="voc-tiny")
    results = evaluate.run(changed, ["none"], str(tree), tmp_path / "eval", device="cpu")
    assert results.protocol == "voc-tiny"
    assert results.changes["train.iterations"] == [400, 1]
    assert "detector.backbone" not in results.changes
    assert "Changed: train.iterations is 1" in (tmp_path / "eval" / "table.txt").read_text()


def test_small_batches_are_named(tree: Path, tmp_path: Path) -> None:
    notes = evaluate.plan(small(), ["none"], str(tree), tmp_path / "eval").notes
    assert any("statistics of 2 images" in note for note in notes)
    frozen = {**recipe().detector.model_dump(), "backbone": "resnet18", "norm": "frozen"}
    assert (
        evaluate.plan(recipe(1, detector=frozen), ["none"], str(tree), tmp_path / "e").notes == []
    )


def test_a_batch_that_cannot_be_split_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch_size is 2, .*among 4 processes. Give a multiple"):
        evaluate.plan(small(), ["none"], str(tree), tmp_path / "eval", processes=4)


def test_joined_years_and_one_of_them(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        make_tree(tmp_path / "devkit" / year, train=4, val=2)
    joined = {"train_splits": ["2007/train", "2012/train"], "test_splits": ["2007/val"]}
    plan = evaluate.plan(
        small(data={**recipe().data.model_dump(), **joined}),
        ["none"],
        str(tmp_path / "devkit"),
        tmp_path / "eval",
    )
    assert (plan.train_images, plan.test_images) == (8, 2)


def test_torchvisions_weights_are_taken_from_its_cache(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "home" / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), cached)
    plan = evaluate.plan(
        small(), ["torchvision:IMAGENET1K_V1", "none"], str(tree), tmp_path / "eval"
    )
    assert plan.loaded == ["120 of 120 tensors of the resnet18 loaded", "random"]
    with pytest.raises(UsageError, match="no such weights for resnet18; it has IMAGENET1K_V1"):
        evaluate.plan(small(), ["torchvision:V9"], str(tree), tmp_path / "eval")


def test_evaluations_are_reported_side_by_side(
    finished: tuple[Path, Results], tree: Path, tmp_path: Path
) -> None:
    from dupr_cli.evaluate.summary import summarise, summary_table

    out, _ = finished
    few = small(data={**recipe().data.model_dump(), "labels": 3})
    evaluate.run(few, ["none"], str(tree), tmp_path / "few", device="cpu")
    reporter = Listening()
    summary = summarise([out, tmp_path / "few"], tmp_path / "sum", reporter)
    before = len(Results.read(out).results)
    assert [row.labels for row in summary.groups[0]] == [8] * before + [3]
    assert reporter.said == []
    text = (tmp_path / "sum" / "summary.txt").read_text()
    assert text == summary_table(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert Image.open(tmp_path / "sum" / "summary.png").width > 600
