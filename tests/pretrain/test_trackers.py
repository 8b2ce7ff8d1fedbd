"""Experiment trackers: the real libraries without a network, and one that fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dupr_cli import plugins
from dupr_cli.errors import UsageError
from dupr_cli.plugins import TRACKERS
from dupr_cli.pretrain.trackers import Trackers, tracker_class
from tests.support.command_line import dupr, pretrain
from tests.support.images import noise_image
from tests.support.reporters import Listening

RECIPE = {"stage": "pretrain", "train": {"steps": 3}}


class Diary:
    """A tracker of another package: it writes what it gets, and breaks when told to."""

    package = "pytest"
    kept: ClassVar[list[object]] = []
    breaks_at: ClassVar[int | None] = None

    def __init__(self, project: str, run: Path, recipe: Mapping[str, Any]) -> None:
        self.kept.append(("start", project, run.name, recipe["stage"]))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.breaks_at:
            raise ConnectionError("no route to https://me:secret@host/api")
        self.kept.append((step, dict(values)))

    def close(self) -> None:
        self.kept.append("end")


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> type[Diary]:
    monkeypatch.setitem(plugins._BUILT_IN[TRACKERS], "diary", "tests.pretrain.test_trackers:Diary")
    monkeypatch.setattr(Diary, "kept", [])
    monkeypatch.setattr(Diary, "breaks_at", None)
    return Diary


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "photos").mkdir()
    for number in range(24):
        noise_image(number).save(folder / "photos" / f"{number}.png")
    dupr("prepare", folder / "photos", folder / "shards")
    return folder / "shards"


def test_a_run_sends_what_metrics_jsonl_holds(
    shards: Path, tmp_path: Path, diary: type[Diary]
) -> None:
    pretrain(shards, tmp_path / "run", "--track", "diary:mine")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sent = [entry for entry in diary.kept if isinstance(entry, tuple) and entry[0] != "start"]
    assert diary.kept[0] == ("start", "mine", "run", "pretrain")
    assert diary.kept[-1] == "end"
    assert sent == [(line.pop("step"), line) for line in lines]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    shards: Path, tmp_path: Path, diary: type[Diary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "breaks_at", 2)
    done = pretrain(shards, tmp_path / "run", "--track", "diary")
    assert done.stderr.count("--track diary: left out from now on (ConnectionError") == 1
    assert "secret" not in done.stderr
    assert (tmp_path / "run" / "latest").exists()
    assert diary.kept[-1] != "end"


def test_unknown_and_missing_trackers_are_named(tmp_path: Path) -> None:
    done = dupr("pretrain", "dupr-r18-cpu-smoke", "--data", "x", "--out", tmp_path / "run",
                "--track", "tensorbored", code=2)  # fmt: skip
    assert "the trackers are mlflow, trackio, wandb" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(diary: type[Diary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diary, "package", "not_there-at_all", raising=False)
    with pytest.raises(UsageError, match="not_there is not installed"):
        tracker_class("diary")


def _track(name: str, run: Path, steps: range) -> list[str]:
    reporter = Listening()
    with Trackers([f"{name}:mine"], run, RECIPE, reporter) as trackers:
        for step in steps:
            trackers.record(step, {"loss": 10.0 - step, "retrieval/res4": step / 10})
    return reporter.warnings


def test_mlflow_keeps_one_run_through_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    assert _track("mlflow", tmp_path / "run", range(1, 3)) == []
    assert _track("mlflow", tmp_path / "run", range(3, 5)) == []
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    history = client.get_metric_history(run.info.run_id, "retrieval/res4")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert run.data.params["train.steps"] == "3"


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert _track("wandb", tmp_path / "run", range(1, 3)) == []
    wandb.teardown()  # its own process writes the file, and may do so after the run was closed
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"retrieval/res4" in content


def test_trackio_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="trackio is not installed")
    assert _track("trackio", tmp_path / "run", range(1, 3)) == []
    assert list((tmp_path / "trackio").rglob("mine*"))
