"""`dupr study` end to end, on tiny runs: its report does not depend on how it was carried out."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dupr_cli.recipe import StudyRecipe, load_recipe, shipped_recipes
from dupr_cli.study import plan
from dupr_cli.study.cells import chains, evaluate_recipe, pretrain_recipe
from dupr_cli.study.report import missing_cells
from tests.support.command_line import dupr
from tests.support.images import write_shards
from tests.support.labelled_scenes import make_tree
from tests.support.mask_sets import plain_folder, scenes
from tests.support.ray_cluster import only_ray_test, small_cluster
from tests.support.recipes import SMALL_NETWORK, TINY
from tests.support.trees import file_digests, tree_bytes

PRETRAIN = [*TINY, SMALL_NETWORK, "train.steps=4"]
FROZEN = [
    "detector.pyramid_channels=32", "detector.head_convolutions=1",
    "detector.rpn_pre_nms=[50, 50]", "data.train_sizes=[64]", "data.test_size=64",
    "data.max_size=128", "train.iterations=3", "train.batch_size=2", "train.workers=0",
    "train.warmup=0", "train.checkpoint_every=2", "test.precise_bn_batches=1", "test.pictures=0",
    "test.score_threshold=0.0",
]  # fmt: skip
REPORT = ("report.md", "report.csv", "report.tex", "report.json")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods, on 40 noise images and 12 labelled scenes."""
    root = tmp_path_factory.mktemp("study")
    write_shards(root / "shards", 40)
    make_tree(root / "tree")
    recipe = {
        "stage": "study",
        "name": "tiny",
        "description": "A tiny study.",
        "shards": str(root / "shards"),
        "data": str(root / "tree"),
        "methods": {
            "dupr": {"recipe": "dupr-r18-cpu-smoke", "set": PRETRAIN},
            "moco": {
                "recipe": "moco-v2-r18-cpu-smoke",
                "set": [value for value in PRETRAIN if "patch" not in value],
            },
        },
        "pretrain_seeds": [0, 1],
        "controls": ["none", "permuted:dupr"],
        "protocols": {
            "frozen": {
                "recipe": "voc-frozen-tiny", "set": FROZEN, "seeds": 2, "labels": [4, "all"],
                "metric": "AP50",
            }
        },
    }  # fmt: skip
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def whole(study: Path) -> Path:
    """OUT of the study, run at once."""
    dupr("study", study / "tiny.yaml", "--out", study / "whole", "--device", "cpu")
    return study / "whole"


def reports(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in REPORT}


@pytest.mark.slow
def test_the_report_holds_every_start_and_number(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    (protocol,) = report["protocols"]
    kinds = ["dupr", "moco", "none", "permuted:dupr"]
    for metric in ("AP", "AP50"):
        curves = protocol["curves"]["curves"][metric]
        assert list(curves) == kinds
        assert all([p["labels"] for p in points] == [4, 8] for points in curves.values())
    # Each kind but the baseline is compared at each number, and one metric decides.
    for found in protocol["differences"].values():
        decided = [d for d in found if d["adjusted_p"] is not None]
        assert {d["first"] for d in decided} == {"dupr", "moco", "permuted:dupr"}
        assert {d["metric"] for d in decided} == {"AP50"}
    assert sorted(report["retrieval"]) == ["dupr-s0", "dupr-s1", "moco-s0", "moco-s1"]
    rows = list(csv.DictReader((whole / "report.csv").open()))
    assert len(rows) == 2 * 4 * 2
    text = (whole / "report.md").read_text()
    assert "Each pre-training run by itself, AP50" in text
    assert re.search(r"^\| moco \| \d+\.\d ±\d+\.\d \| \d+\.\d ±\d+\.\d \|$", text, re.MULTILINE)
    assert Image.open(whole / "frozen.png").width > 600
    assert str(whole) not in text + (whole / "report.json").read_text()


@pytest.mark.slow
def test_runs_of_a_method_are_averaged_seed_by_seed(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    points = report["protocols"][0]["curves"]["curves"]["AP"]["dupr"]
    for point in points:
        by_run = []
        for run in ("dupr-s0", "dupr-s1"):
            folder = whole / "evaluate" / "frozen" / run / f"labels-{point['labels']}"
            (entry,) = json.loads((folder / "results.json").read_text())["results"]
            by_run.append({str(t["seed"]): t["metrics"]["AP"] for t in entry["trials"]})
        for seed, value in point["values"].items():
            assert value == pytest.approx(sum(of[seed] for of in by_run) / 2)


@pytest.mark.slow
def test_a_finished_study_runs_nothing(study: Path, whole: Path) -> None:
    before = reports(whole)
    ours = file_digests(whole)
    terminal = {"FORCE_COLOR": "1"}
    done = dupr("study", study / "tiny.yaml", "--out", whole, "--device", "cpu", env=terminal)
    assert done.stderr.count("finished before") == 11
    assert "Held-out patch retrieval" in done.stdout
    assert "|" not in done.stdout  # people get tables, no Markdown
    assert "![" not in done.stdout
    assert "pretrain 4/4" not in done.stderr
    assert reports(whole) == before
    again = file_digests(whole)
    changed = {name for name in ours.keys() | again.keys() if ours.get(name) != again.get(name)}
    assert changed <= {".dupr.lock", "frozen.png"}  # who wrote; a picture need not be repeatable


@pytest.mark.slow
def test_tasks_and_interruptions_give_the_same_report(study: Path, whole: Path) -> None:
    out = study / "parts"
    # Stops at once, within the first cell.
    dupr("study", study / "tiny.yaml", "--out", out, "--device", "cpu", "--max-hours", 0, code=75)
    common = ("study", study / "tiny.yaml", "--out", out, "--device", "cpu", "--task")
    for task in ("3/3", "1/3"):
        done = dupr(*common, task)
        assert "no report yet" in done.stderr
        assert not (out / "report.md").exists()
    dupr(*common, "2/3")
    assert reports(out) == reports(whole)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_report(study: Path) -> None:
    few = ("--set", "pretrain_seeds=[0]", "--set", "controls=[none]", "--set",
           f"methods={{dupr: {{recipe: dupr-r18-cpu-smoke, set: {PRETRAIN}}}}}")  # fmt: skip
    common = ("study", study / "tiny.yaml", *few, "--device", "cpu", "--out")
    dupr(*common, study / "few")
    with only_ray_test(), small_cluster():
        dupr(*common, study / "on-ray", "--engine", "ray")
    assert reports(study / "on-ray") == reports(study / "few")


@pytest.mark.slow
def test_a_cell_is_an_ordinary_run_and_evaluation(study: Path, whole: Path) -> None:
    settings = [argument for value in PRETRAIN for argument in ("--set", value)]
    run = study / "by-hand"
    dupr("pretrain", "dupr-r18-cpu-smoke", "--data", study / "shards", "--out", run, *settings,
         "--seed", 1, "--device", "cpu")  # fmt: skip
    settings = [argument for value in FROZEN for argument in ("--set", value)]
    dupr("evaluate", "voc", run, "-r", "voc-frozen-tiny", "--data", study / "tree",
         "--labels", "4,all", "--seeds", 2, *settings, "--out", study / "evaluated",
         "--device", "cpu")  # fmt: skip
    of_cell = whole / "evaluate" / "frozen" / "dupr-s1"
    for labels in ("labels-4", "labels-8"):
        one, other = (
            json.loads((folder / labels / "results.json").read_text())["results"][0]["trials"]
            for folder in (study / "evaluated", of_cell)
        )
        assert [t["metrics"] for t in one] == [t["metrics"] for t in other]


@pytest.mark.slow
def test_all_starts_have_the_backbone_of_the_methods(whole: Path) -> None:
    for start in ("none", "dupr-s0", "permuted-dupr-s0"):
        file = whole / "evaluate" / "frozen" / start / "labels-4" / "results.json"
        (entry,) = json.loads(file.read_text())["results"]
        assert entry["architecture"] == "timm:test_resnet"


@pytest.mark.slow
def test_other_data_is_another_study(study: Path, whole: Path) -> None:
    make_tree(study / "tree2")
    before = file_digests(whole)
    done = dupr("study", study / "tiny.yaml", "--out", whole, "--data", study / "tree2", code=2)
    assert f"data: {study / 'tree'} there" in done.stderr
    assert file_digests(whole) == before


@pytest.mark.slow
def test_evaluations_of_a_changed_run_are_not_finished(study: Path, whole: Path) -> None:
    changed = f"methods.moco.set=[{SMALL_NETWORK}, train.steps=5]"
    recipe = load_recipe(StudyRecipe, str(study / "tiny.yaml"), [changed])
    missing = missing_cells(recipe, whole)
    assert missing == [
        f"{kind}/moco-s{seed}" for seed in (0, 1) for kind in ("pretrain", "evaluate/frozen")
    ]


@pytest.mark.slow
def test_a_failed_chain_does_not_keep_others_from_running(study: Path) -> None:
    """The learning rate of the only method makes it diverge."""
    out = study / "failing"
    recipe = yaml.safe_load((study / "tiny.yaml").read_text())
    recipe["methods"] = {"dupr": recipe["methods"]["dupr"]}
    recipe["methods"]["dupr"]["set"] = [*PRETRAIN, "optimizer.lr=1e30", "train.max_bad_steps=1"]
    recipe |= {"pretrain_seeds": [0], "controls": ["none"]}
    (study / "failing.yaml").write_text(yaml.safe_dump(recipe))
    done = dupr("study", study / "failing.yaml", "--out", out, "--device", "cpu", code=1)
    assert "1 cells failed" in done.stderr
    assert "pretrain/dupr-s0" in done.stderr
    assert (out / "cells" / "evaluate" / "frozen" / "none.json").is_file()


@pytest.mark.slow
def test_more_seeds_run_alone(study: Path, whole: Path) -> None:
    recipe = yaml.safe_load((study / "tiny.yaml").read_text())
    recipe["pretrain_seeds"] = [0, 1, 2]
    del recipe["methods"]["moco"]
    (study / "more.yaml").write_text(yaml.safe_dump(recipe))
    planned = plan(study / "more.yaml", whole)
    assert planned.missing == [
        "pretrain/dupr-s2", "evaluate/frozen/dupr-s2", "evaluate/frozen/permuted-dupr-s2",
    ]  # fmt: skip


def test_a_plan_changes_nothing(study: Path) -> None:
    before = tree_bytes(study)
    done = dupr("study", study / "tiny.yaml", "--out", study / "new", "--dry-run", "--json")
    planned = json.loads(done.stdout)["plan"]
    assert planned["missing"] == planned["cells"]
    assert len(planned["cells"]) == 11
    assert tree_bytes(study) == before


def test_wrong_studies_say_what_to_do(study: Path) -> None:
    out = study / "wrong"
    tiny = study / "tiny.yaml"
    for options, words in (
        (("--set", "shards=''"), "shards"),
        (("--set", "baseline=nobody"), "neither a method nor a control"),
        (("--set", "controls=['permuted:nobody']"), "no nobody"),
        (("--set", "methods.dupr.recipe=nothing"), "nothing"),
        (("--engine", "cloud"), "here or ray"),
        (("--set", "controls=[none, dupr]"), "a method has this name"),
        (("--data", study / "nowhere"), "nowhere"),
        (("--set", "protocols.frozen.labels=[8, all]"), "like another number of the list"),
        (("--set", "methods.moco.set=[model.backbone=resnet34]"), "resnet34 and timm:test_resnet"),
        (("--task", "4/3"), "--task 4/3"),
    ):
        done = dupr("study", tiny, "--out", out, *options, code=2)
        assert words in done.stderr, done.stderr
    (study / "full").mkdir()
    (study / "full" / "mine").write_text("x")
    done = dupr("study", tiny, "--out", study / "full", code=2)
    assert "not empty and holds no study" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_segmentation_is_a_protocol_like_others(study: Path, tmp_path: Path) -> None:
    plain_folder(tmp_path / "masks", scenes(train=4, val=2))
    recipe = yaml.safe_load((study / "tiny.yaml").read_text())
    del recipe["methods"]["moco"]
    recipe |= {"data": str(tmp_path / "masks"), "pretrain_seeds": [0], "controls": ["none"]}
    small = [
        "semantic.short_side=64", "train.iterations=3", "train.batch_size=2", "train.workers=0",
        "train.warmup=0", "test.precise_bn_batches=1", "test.pictures=0",
    ]  # fmt: skip
    fcn = {"recipe": "semantic-frozen-tiny", "set": small, "seeds": 2, "metric": "mIoU"}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**recipe, "protocols": {"fcn": fcn}}))
    dupr("study", file, "--out", tmp_path / "out", "--device", "cpu")
    (protocol,) = json.loads((tmp_path / "out" / "report.json").read_text())["protocols"]
    assert set(protocol["curves"]["curves"]) == {"mIoU", "pixAcc"}
    decided = [d for of in protocol["differences"].values() for d in of if d["adjusted_p"]]
    assert {d["metric"] for d in decided} == {"mIoU"}
    file.write_text(yaml.safe_dump({**recipe, "protocols": {"fcn": {**fcn, "metric": "AP"}}}))
    done = dupr("study", file, "--out", tmp_path / "other", code=2)
    assert "measures mIoU; give metric: mIoU" in done.stderr


@pytest.mark.parametrize("name", shipped_recipes("study"))
def test_shipped_studies_have_whole_recipes(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(StudyRecipe, name)
    for method in recipe.methods:
        pretrain_recipe(recipe, method, 0)
    for protocol in recipe.protocols:
        assert evaluate_recipe(recipe, protocol).trials == recipe.protocols[protocol].seeds
    names = [cell.name for chain in chains(recipe, tmp_path) for cell in chain.cells]
    assert len(set(names)) == len(names)


def test_settings_of_all_methods_and_protocols_yield_to_their_own() -> None:
    everywhere = [
        "pretrain_set=[train.steps=7, train.precision=bfloat16]",
        "evaluate_set=[train.iterations=9, train.precision=bfloat16]",
        "methods.dupr.set=[train.steps=8]",
    ]
    recipe = load_recipe(StudyRecipe, "small-cpu", everywhere)
    assert pretrain_recipe(recipe, "dupr", 0).train.steps == 8
    assert pretrain_recipe(recipe, "dupr", 0).train.precision == "bfloat16"
    assert evaluate_recipe(recipe, "frozen").train.iterations == 9
    assert evaluate_recipe(recipe, "frozen").train.precision == "bfloat16"
