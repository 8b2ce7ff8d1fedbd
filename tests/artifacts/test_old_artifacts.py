"""Artifacts that an earlier dupr wrote still open.

tests/artifacts/old holds what commit 3d16d54 made of sixteen images of 16 pixels: shards, the text
of a run stopped at step 2 of 4, and an evaluation. Tensors are too large to keep; headers.json has
their names, types and shapes, and they are made here in the files' layout of then.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.results import Results
from dupr_cli.artifacts.run import newest_checkpoint
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.evaluate.subsets import stored_labels
from dupr_cli.models.backbone import load_backbone
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import PretrainRecipe, load_recipe
from tests.support.command_line import dupr

OLD = Path(__file__).parent / "old"
_TYPES = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}


def tensors_of(part: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Random tensors of the recorded names, and the metadata of their file."""
    torch.manual_seed(0)
    recorded = json.loads((OLD / "headers.json").read_text())[part]
    made = {}
    for name, (kind, shape) in recorded["tensors"].items():
        values = torch.zeros(shape, dtype=_TYPES[kind])
        if kind == "F32" and part != "optimizer":
            # Small enough for training to go on from them.
            values.normal_(0, 1 / math.sqrt(max(1, math.prod(shape[1:]))))
            values.abs_() if "running_var" in name else values
        made[name] = values
    return made, recorded["metadata"]


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as the earlier dupr left it."""
    run = tmp_path_factory.mktemp("old") / "run"
    step = run / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    state = json.loads((OLD / "run" / "state.json").read_text())
    for part in ("model", "optimizer"):
        file = step / f"{part}.safetensors"
        save_file(tensors_of(part)[0], file)
        state["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (step / "state.json").write_text(json.dumps(state))
    (run / "latest").symlink_to(step.relative_to(run))
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl"):
        shutil.copy(OLD / "run" / name, run)
    return run


@pytest.mark.parametrize(("split", "images"), [("train", 12), ("val", 4)])
def test_shards_of_an_earlier_dupr_open(split: str, images: int) -> None:
    shards = open_shards(str(OLD / "shards"), split)
    assert len(shards) == images
    sample = shards[0]
    assert (sample.width, sample.height) == (16, 16)
    assert sample.boxes is not None


def test_shards_of_an_earlier_dupr_are_whole() -> None:
    assert json.loads(dupr("prepare", "verify", OLD / "shards", "--json").stdout)["problems"] == []


def test_shards_of_an_earlier_dupr_are_a_labelled_set() -> None:
    images = open_labelled(str(OLD / "shards"), ["train"], SilentReporter())
    assert len(stored_labels(OLD / "eval" / "labels.json", images)) == 6


def test_checkpoint_of_an_earlier_dupr_opens(old_run: Path) -> None:
    assert newest_checkpoint(old_run).state.step == 2
    weights = read_weights(str(old_run))
    assert load_backbone(ResNetBackbone("resnet18"), weights) == 120


def test_recipe_of_an_earlier_run_loads(old_run: Path) -> None:
    recipe = load_recipe(PretrainRecipe, str(old_run / "recipe.yaml"))
    assert (recipe.train.steps, recipe.method.queue_length) == (4, 16)


@pytest.mark.slow
def test_run_of_an_earlier_dupr_is_continued(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(OLD / "shards", tmp_path / "shards")
    shutil.copytree(old_run, tmp_path / "run", symlinks=True)
    monkeypatch.chdir(tmp_path)
    same = ("pretrain", "run/recipe.yaml", "--data", "shards", "--out", "run")
    # Its bins were pooled by RoIAlign's convention, which is no longer the default.
    said = dupr(*same, code=2).stderr
    assert "method.patch.cell_centres: convention there, backbone now" in said
    dupr(*same, "--set", "method.patch.cell_centres=convention")
    assert newest_checkpoint(tmp_path / "run").state.step == 4
    logged = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().split("\n")
              if line]  # fmt: skip
    assert logged == [1, 2, 3, 4]


def test_weights_file_of_an_earlier_dupr_opens(tmp_path: Path) -> None:
    tensors, metadata = tensors_of("weights")
    save_file(tensors, tmp_path / "backbone.safetensors", metadata=metadata)
    weights = read_weights(str(tmp_path / "backbone.safetensors"))
    assert (weights.metadata.method, weights.metadata.step) == ("DUPR", 2)
    assert load_backbone(ResNetBackbone("resnet18"), weights) == 120


def test_results_of_an_earlier_dupr_open() -> None:
    results = Results.read(OLD / "eval")
    assert [entry.weights for entry in results.results] == ["none", "run"]
    assert [len(entry.trials) for entry in results.results] == [1, 1]


def test_results_of_an_earlier_dupr_are_reported() -> None:
    found = json.loads(dupr("evaluate", "report", OLD / "eval", "--json").stdout)
    assert [row["weights"] for row in found["groups"][0]] == ["none", "run"]
