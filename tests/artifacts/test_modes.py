"""Modes of written files: what the umask says, so that a group that shares a disk can read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dupr_cli import export
from dupr_cli.artifacts.run import CheckpointState, write_checkpoint
from dupr_cli.recipe import ExportRecipe
from tests.support.images import write_shards
from tests.support.weights import random_weights


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def unlike(folder: Path, umask: int) -> list[str]:
    """Files and folders whose mode is not that of the umask."""
    return [
        f"{path.relative_to(folder)} {path.stat().st_mode & 0o777:o}"
        for path in (folder, *folder.rglob("*"))
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    ]


def test_checkpoints_follow_the_umask(umask: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    state = CheckpointState(1, "resnet18", [0.5] * 3, [0.2] * 3, 64, "digest", {})
    write_checkpoint(run, state, {"a": torch.zeros(1)}, {"b": torch.zeros(1)}, keep=1)
    assert not unlike(run, umask)


def test_shards_follow_the_umask(umask: int, tmp_path: Path) -> None:
    assert not unlike(write_shards(tmp_path / "shards", 3), umask)


def test_exports_follow_the_umask(umask: int, tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    formats = ["torchvision", "timm"]
    recipe = ExportRecipe.model_validate({"formats": formats})
    export.run(recipe, str(weights), tmp_path / "out")
    assert not unlike(tmp_path / "out", umask)
