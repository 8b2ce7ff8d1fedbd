"""Weights fetched by the real huggingface_hub client from a local server with its endpoints."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from dupr_cli.artifacts.weights import WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.models.compared import open_compared
from dupr_cli.models.resnet import ResNetBackbone
from tests.support.hub_client import wait_briefly

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(files: dict[str, bytes], refuse: int | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # Without keep-alive: a closed server must not go on answering.
        protocol_version = "HTTP/1.0"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            body, headers, status = self._found()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _found(self) -> tuple[bytes, dict[str, str], int]:
            if refuse:
                return b"{}", {}, refuse
            if self.path.startswith("/api/models/me/model/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in files.items()
                ]
                return json.dumps(tree).encode(), {"Content-Type": "application/json"}, 200
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/me/model/resolve/") and name in files:
                digest = hashlib.sha256(files[name]).hexdigest()
                return files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, 200
            missing = "EntryNotFound" if self.path.startswith("/me/model/") else "RepoNotFound"
            return b"{}", {"X-Error-Code": missing}, 404

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def hub(
    files: dict[str, bytes],
    folder: Path,
    patch: pytest.MonkeyPatch,
    refuse: int | None = None,
) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(files, refuse))
    url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    patch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


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
    with pytest.raises(UsageError, match="write it as hf://OWNER/NAME"):
        read_weights("hf://model")


def test_refusal_of_the_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        hub({}, tmp_path, monkeypatch, refuse=403),
        pytest.raises(RunError, match=r"HTTP 403\).*HF_TOKEN"),
    ):
        read_weights("hf://me/model")
