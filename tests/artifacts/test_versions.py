"""`format_version`: every artifact has one, and one of a later dupr is refused by that word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dupr_cli.artifacts import results, run, shard_files, shards, weights
from dupr_cli.artifacts.results import DatasetIdentity, Results
from dupr_cli.artifacts.run import (
    CheckpointState,
    newest_checkpoint,
    read_environment,
    write_checkpoint,
    write_environment,
)
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.artifacts.versions import VersionError, check_version
from dupr_cli.artifacts.weights import read_weights, write_weights
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.evaluate import subsets
from dupr_cli.evaluate.subsets import stored_labels, write_labels
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe.evaluate import DetectionDataSection
from tests.support.command_line import pretrain
from tests.support.images import write_shards
from tests.support.labelled_scenes import make_tree
from tests.support.weights import METADATA

TENSORS = {"conv1.weight": torch.zeros(1)}


@dataclass(frozen=True)
class Artifact:
    """file: that carries the version. newest: that is read. opened: reads the artifact."""

    file: Path
    newest: int
    opened: Callable[[], object]

    def set_version(self, version: int | None) -> None:
        values = json.loads(self.file.read_bytes())
        assert values.pop("format_version") <= self.newest
        self.file.write_text(json.dumps(values if version is None else
                                        {**values, "format_version": version}))  # fmt: skip


def manifest(folder: Path) -> Artifact:
    write_shards(folder, 3)
    file = folder / "manifest.json"
    return Artifact(file, shards.FORMAT_VERSION, lambda: open_shards(str(folder))[0])


def index(folder: Path) -> Artifact:
    write_shards(folder, 3)
    file = folder / "train-000000.index.json"
    return Artifact(file, shard_files.FORMAT_VERSION, lambda: open_shards(str(folder))[0])


def state(folder: Path) -> Artifact:
    made = CheckpointState(1, "resnet18", [0.5] * 3, [0.2] * 3, 64, "digest", {})
    path = write_checkpoint(folder, made, TENSORS, TENSORS, keep=2)
    # An older one is whole: it must not be taken in silence in place of the newer one.
    write_checkpoint(folder, replace(made, step=0), TENSORS, TENSORS, keep=2)
    return Artifact(path / "state.json", run.FORMAT_VERSION, lambda: newest_checkpoint(folder))


def environment(folder: Path) -> Artifact:
    folder.mkdir()
    write_environment(folder, {"torch": "2"})
    file = folder / "environment.json"
    return Artifact(file, run.ENVIRONMENT_VERSION, lambda: read_environment(folder))


def evaluation(folder: Path) -> Artifact:
    folder.mkdir()
    used = DatasetIdentity("set", "val", 1, 1, "digest")
    file = Results("p", "AP", used, used, [], [], {}, "", [0], "0.1").write(folder)
    return Artifact(file, results.FORMAT_VERSION, lambda: Results.read(folder))


def labels(folder: Path) -> Artifact:
    images = open_labelled(str(make_tree(folder / "tree")), ["train"], SilentReporter())
    write_labels(folder, images, DetectionDataSection())
    file = folder / "labels.json"
    return Artifact(file, subsets.FORMAT_VERSION, lambda: stored_labels(file, images))


ARTIFACTS = (manifest, index, state, environment, evaluation, labels)


@pytest.mark.parametrize("make", ARTIFACTS)
def test_artifact_of_a_later_format_is_refused(
    make: Callable[[Path], Artifact], tmp_path: Path
) -> None:
    artifact = make(tmp_path / "it")
    artifact.set_version(artifact.newest + 1)
    with pytest.raises(VersionError) as caught:
        artifact.opened()
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{artifact.file}: its format_version is {artifact.newest + 1}, but this dupr reads up to "
        f"{artifact.newest}. Update dupr: pip install -U dupr-cli."
    )


@pytest.mark.parametrize("make", ARTIFACTS)
def test_artifact_without_a_version_opens(make: Callable[[Path], Artifact], tmp_path: Path) -> None:
    artifact = make(tmp_path / "it")
    artifact.set_version(None)
    artifact.opened()


def test_checkpoint_of_a_later_format_is_not_set_aside_by_the_run_that_meets_it(
    tmp_path: Path, tiny_shards: Path
) -> None:
    out = tmp_path / "run"
    pretrain(tiny_shards, out, "--stop-after", 1, code=75)
    state = out / "latest" / "state.json"
    Artifact(state, run.FORMAT_VERSION, lambda: None).set_version(run.FORMAT_VERSION + 1)
    said = pretrain(tiny_shards, out, code=2).stderr
    assert "its format_version is 3, but this dupr reads up to 2" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]


def with_version(file: Path, version: str | None) -> None:
    """Replace the version in the header of a weights file."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"].pop("dupr_format_version")
    if version is not None:
        header["__metadata__"]["dupr_format_version"] = version
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[end:])


def test_weights_of_a_later_format_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_weights(file, TENSORS, METADATA)
    with_version(file, str(weights.FORMAT_VERSION + 1))
    with pytest.raises(VersionError, match=re.escape(f"{file}: its format_version is 3, but this")):
        read_weights(str(file))


def test_weights_without_a_version_open(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_weights(file, TENSORS, METADATA)
    with_version(file, None)
    with safe_open(file, framework="pt") as opened:
        assert "dupr_format_version" not in opened.metadata()
    assert read_weights(str(file)).tensors.keys() == TENSORS.keys()


@given(st.none() | st.booleans() | st.floats() | st.text() | st.integers(max_value=0))
def test_what_is_no_version_is_damage(found: object) -> None:
    if found is None:
        check_version(found, 1, "x")
        return
    with pytest.raises(UsageError, match=r"x: its format_version is .*whole number from 1"):
        check_version(found, 1, "x")
