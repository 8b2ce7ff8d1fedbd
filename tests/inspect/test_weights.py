"""`dupr inspect weights`: the facts of a file, and every kind of difference to another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dupr_cli.artifacts.weights import read_weights, write_weights
from tests.support.command_line import dupr
from tests.support.weights import METADATA, random_weights


def inspected(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dupr("inspect", "weights", *words, "--json").stdout)
    return found


def test_layout_metadata_shapes_and_norms_are_those_of_the_file(tmp_path: Path) -> None:
    path = random_weights(tmp_path / "w.safetensors")
    found, read = inspected(path), read_weights(str(path))
    assert found["layout"] == "torchvision"
    assert found["sha256"] == read.sha256
    assert found["metadata"]["architecture"] == "resnet18"
    assert found["metadata"]["input_size"] == 64
    assert {each["name"] for each in found["tensors"]} == set(read.tensors)
    for each in found["tensors"]:
        tensor = read.tensors[each["name"]]
        assert each["shape"] == list(tensor.shape)
        assert each["norm"] == pytest.approx(float(torch.linalg.norm(tensor.double().flatten())))


def test_every_kind_of_difference_is_found(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = {name: torch.arange(4.0) for name in ("same", "scaled", "shaped", "gone")}
    save_file(values, a)
    others = {"same": values["same"], "scaled": 3 * values["scaled"], "shaped": torch.ones(5)}
    save_file({**others, "new": torch.ones(2)}, b)
    found = inspected(a, "--against", b)["against"]
    assert {layer["name"]: layer["state"] for layer in found["layers"]} == {
        "same": "equal",
        "scaled": "changed",
        "shaped": "other shape",
        "gone": "missing",
        "new": "extra",
    }
    (scaled,) = (layer for layer in found["layers"] if layer["name"] == "scaled")
    assert scaled["distance"] == pytest.approx(2)
    assert scaled["largest"] == pytest.approx(6)
    # |2 x| over |(x, x)|, of the tensors that can be compared.
    assert found["distance"] == pytest.approx(2 / math.sqrt(2))
    assert found["counts"] == {
        "equal": 1, "changed": 1, "other shape": 1, "missing": 1, "extra": 1,
    }  # fmt: skip


def test_the_table_names_what_changed_and_no_more(tmp_path: Path) -> None:
    path = random_weights(tmp_path / "a.safetensors")
    tensors = read_weights(str(path)).tensors
    other = tmp_path / "b.safetensors"
    write_weights(other, {**tensors, "conv1.weight": tensors["conv1.weight"] + 1}, METADATA)
    shown = dupr("inspect", "weights", path, "--against", other).stdout
    assert "1 changed" in shown
    assert f"{len(tensors) - 1} equal" in shown
    assert "conv1.weight" in shown
    assert "layer1" not in shown


def test_a_value_that_is_not_finite_is_said(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.tensor([1.0, math.nan])}, path)
    assert inspected(path)["tensors"][0]["norm"] is None
    assert "not finite" in dupr("inspect", "weights", path).stdout


def test_runs_can_be_compared(tiny_run: Path) -> None:
    found = inspected(tiny_run, "--against", tiny_run / "latest")
    assert set(found["against"]["counts"]) == {"equal"}
    assert found["against"]["distance"] == 0


def test_damaged_and_missing_files_are_one_message(tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(random_weights(tmp_path / "w.safetensors").read_bytes()[:1000])
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"no weights")
    for words, message in (
        ((cut,), "not a whole safetensors file"),
        ((tmp_path / "none",), "does not exist"),
        ((pickled,), "read from .safetensors files only"),
        ((tmp_path / "w.safetensors", "--against", cut), "not a whole safetensors file"),
    ):
        done = dupr("inspect", "weights", *words, code=2)
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
