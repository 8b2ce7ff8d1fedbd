"""Weights that timm publishes: fetched by the real Hub client from a local server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

from dupr_cli.artifacts.weights import read_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.models.compared import open_compared
from dupr_cli.models.published import open_weights
from tests.support.command_line import pretrain
from tests.support.hub_client import wait_briefly
from tests.support.hub_server import hub
from tests.support.weights import random_weights

NETWORK, TAG = "timm:test_convnext", "r160_in1k"
REPOSITORY = f"timm/test_convnext.{TAG}"


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    """The state dict of the whole network, with its classifier, as timm's repositories hold it."""
    torch.manual_seed(3)
    state: dict[str, torch.Tensor] = timm.create_model("test_convnext").state_dict()
    return state


def test_timms_weights_are_fetched_once_without_the_classifier(
    published: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_briefly(monkeypatch)
    files = {"model.safetensors": save(published)}
    with hub(files, tmp_path, monkeypatch, repository=REPOSITORY):
        (compared,) = open_compared([f"{NETWORK}.{TAG}"])
    assert compared.weights is not None
    tensors = compared.weights.tensors
    assert compared.architecture == NETWORK
    assert f"{len(tensors)} of {len(tensors)} tensors" in compared.loaded
    assert all(torch.equal(published[name], tensor) for name, tensor in tensors.items())
    assert published.keys() - tensors.keys() >= {"head.fc.weight", "head.fc.bias"}
    facts: Any = timm.get_pretrained_cfg(f"test_convnext.{TAG}")
    assert compared.weights.metadata.input_mean == tuple(facts.mean)
    again = open_weights(f"{NETWORK}.{TAG}", NETWORK)  # the server is gone
    assert again.sha256 == compared.sha256
    with pytest.raises(RunError, match="the Hub cannot be reached"):
        open_weights("timm:test_vit3.r160_in1k", "timm:test_vit3")


def test_a_run_starts_from_them(
    published: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tiny_shards: Path,
) -> None:  # fmt: skip
    files = {"model.safetensors": save(published)}
    options = ["--set", f"model.backbone={NETWORK}", "--set", f"model.init={NETWORK}.{TAG}"]
    options += ["--set", "train.steps=1", "--set", "optimizer.lr=1e-12"]
    with hub(files, tmp_path, monkeypatch, repository=REPOSITORY):
        pretrain(tiny_shards, tmp_path / "run", *options)
    started = read_weights(str(tmp_path / "run")).tensors
    assert all(torch.allclose(published[name], t, atol=1e-6) for name, t in started.items())


def test_timms_resnets_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("resnet18").state_dict()
    with hub({"model.safetensors": save(state)}, tmp_path, monkeypatch,
             repository="timm/resnet18.a1_in1k"):  # fmt: skip
        as_torchvision = open_weights("timm:resnet18.a1_in1k", "resnet18")
        as_timm = open_weights("timm:resnet18.a1_in1k", "timm:resnet18")
    assert as_torchvision.metadata.architecture == "resnet18"
    assert as_torchvision.metadata.layout == "torchvision"
    assert as_timm.metadata.architecture == "timm:resnet18"
    assert as_torchvision.tensors.keys() == as_timm.tensors.keys()
    assert len(as_timm.tensors) == 120


@pytest.mark.parametrize(("address", "message"), [
    ("timm:resnet18.a9_in1k", "no such weights .* it has timm:resnet18.a1_in1k"),
    ("timm:resnet18d", "it has timm:resnet18d."),
    ("timm:darknet17", "it has none"),
    ("timm:resnet19.a1_in1k", "timm .* has no resnet19"),
])  # fmt: skip
def test_what_timm_does_not_publish_is_said(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_weights(address, "resnet18")


def test_a_missing_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_shards: Path
) -> None:
    wait_briefly(monkeypatch)
    with hub({}, tmp_path, monkeypatch):
        pass  # its port is closed now, and its cache is empty
    options = ["--set", f"model.backbone={NETWORK}", "--set", f"model.init={NETWORK}.{TAG}"]
    done = pretrain(tiny_shards, tmp_path / "run", *options, code=1)
    message = " ".join(done.stderr.split())
    assert "the Hub cannot be reached" in message
    assert REPOSITORY in message


def test_a_run_starts_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_shards: Path
) -> None:
    file = random_weights(tmp_path / "backbone.safetensors")
    options = ["--set", "model.backbone=resnet18", "--set", "model.init=hf://me/model"]
    options += ["--set", "train.steps=1", "--set", "optimizer.lr=1e-12"]
    with hub({"backbone.safetensors": file.read_bytes()}, tmp_path, monkeypatch):
        pretrain(tiny_shards, tmp_path / "run", *options)
    given = read_weights(str(file)).tensors
    started = read_weights(str(tmp_path / "run")).tensors
    weights = [name for name in given if name.endswith(".weight")]
    assert all(torch.allclose(given[name], started[name], atol=1e-6) for name in weights)
