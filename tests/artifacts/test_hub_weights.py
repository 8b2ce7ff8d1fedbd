"""Weights fetched by the real huggingface_hub client from a local server with its endpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from dupr_cli.artifacts.weights import WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.models.compared import open_compared
from dupr_cli.models.resnet import ResNetBackbone
from tests.support.hub_client import wait_briefly
from tests.support.hub_server import hub


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 224)
    write_weights(path, ResNetBackbone("resnet18").state_dict(), metadata)
    return path.read_bytes()


@pytest.mark.parametrize(
    "address",
    [
        "hf://me/model",
        "hf://me/model/backbone.safetensors",
        "hf://me/model@v1/backbone.safetensors",
    ],
)
def test_weights_of_the_hub(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    files = {"backbone.safetensors": weights, "README.md": b"a card"}
    with hub(files, tmp_path, monkeypatch):
        read = read_weights(address)
        (candidate,) = open_compared([address])
    assert read.address == address
    assert read.sha256 == hashlib.sha256(weights).hexdigest()
    assert candidate.loaded == "120 of 120 tensors of the resnet18 loaded"
    assert candidate.folder.startswith("01-me-model")


def test_what_was_fetched_is_read_again_without_the_hub(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_briefly(monkeypatch)
    address = "hf://me/model/backbone.safetensors"
    with hub({"backbone.safetensors": weights}, tmp_path, monkeypatch):
        read_weights(address)
    assert read_weights(address).sha256 == hashlib.sha256(weights).hexdigest()
    with pytest.raises(RunError, match="the Hub cannot be reached"):
        read_weights("hf://me/model/other.safetensors")


def test_what_the_hub_does_not_have_is_said(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub({"a.safetensors": weights, "b.safetensors": weights}, tmp_path, monkeypatch):
        with pytest.raises(UsageError, match=r"has a\.safetensors, b\.safetensors; name one"):
            read_weights("hf://me/model")
        for address in ("hf://me/model/c.safetensors", "hf://me/other/a.safetensors"):
            with pytest.raises(UsageError, match="the repository, revision or file does not exist"):
                read_weights(address)
    with (
        hub({"README.md": b""}, tmp_path, monkeypatch),
        pytest.raises(UsageError, match=r"no \.safetensors file"),
    ):
        read_weights("hf://me/model")
    for address in ("hf://model", "hf://..", "hf://../a/b", "hf://me/model/../../etc/passwd"):
        with pytest.raises(UsageError, match="write it as hf://OWNER/NAME"):
            read_weights(address)


def test_refusal_of_the_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        hub({}, tmp_path, monkeypatch, refuse=403),
        pytest.raises(RunError, match=r"HTTP 403\).*HF_TOKEN"),
    ):
        read_weights("hf://me/model")
