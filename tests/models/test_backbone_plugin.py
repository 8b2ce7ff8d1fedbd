"""The worked example of docs/plugins.md: a backbone of another package, through every stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.command_line import dupr, pretrain
from tests.support.example_package import install
from tests.support.labelled_scenes import make_tree
from tests.support.processes import forked
from tests.support.recipes import SMALL_DETECTOR


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed into a folder of its own."""
    return install(tmp_path_factory.mktemp("site"))


def test_every_stage_takes_it(
    installed: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--set", "model.backbone=example:small", "--set", "train.steps=2"]
    options += ["--set", "train.checkpoint_every=1"]
    pretrain(tiny_shards, run, *options, "--stop-after", 1, code=75)
    pretrain(tiny_shards, run, *options)
    pretrain(tiny_shards, whole, *options)
    place = Path("checkpoints") / "step-00000002" / "model.safetensors"
    assert (run / place).read_bytes() == (whole / place).read_bytes()

    file = tmp_path / "backbone.safetensors"
    dupr("export", run, "--out", file)
    done = dupr("export", file, "--to", "onnx", "--out", tmp_path / "onnx", "--json")
    assert json.loads(done.stdout)["formats"][0]["max_difference"] <= 1e-5

    from example_backbone import WIDTHS, Trunk  # type: ignore[import-not-found]

    from dupr_cli.export import load_into

    detector = torch.nn.ModuleDict({"trunk": Trunk(WIDTHS["small"]), "head": torch.nn.Identity()})
    found = load_into(detector, file)
    assert (found.place, found.tensors) == ("trunk.", len(Trunk(WIDTHS["small"]).state_dict()))
    assert found.levels == ["res2", "res3", "res4", "res5"]

    tree = make_tree(tmp_path / "tree")
    small = [argument for override in SMALL_DETECTOR for argument in ("--set", override)]
    for name, recipe in (("frozen", ["--frozen", "-r", "voc-frozen-tiny"]), (
        "pyramid", ["-r", "voc-tiny", "--set", "detector.model=faster-rcnn-fpn",
                    "--set", "detector.anchor_sizes=[8, 16, 32, 64, 128]"])):  # fmt: skip
        dupr("evaluate", "voc", file, "none", "--data", tree, "--out", tmp_path / name,
             "--seeds", 1, *recipe, *small)  # fmt: skip
        results = json.loads((tmp_path / name / "results.json").read_bytes())["results"]
        assert [of["architecture"] for of in results] == ["example:small"] * 2


def test_an_installed_package_is_found_by_the_program(
    installed: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke", "--data",
               str(tiny_shards), "--out", str(tmp_path / "run"), "--dry-run", "--set",
               "model.backbone=example:medium"]  # fmt: skip
    with_it = forked(command, environment={"PYTHONPATH": str(installed)})
    assert with_it.returncode == 2
    assert "example:medium is none of small, large" in " ".join(with_it.stderr.split())
    without = forked(command)
    assert without.returncode == 2
    assert "example:medium, which is not a backbone" in " ".join(without.stderr.split())
