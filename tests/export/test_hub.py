"""Pushing through the real huggingface_hub client to a local server that speaks its endpoints."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard, metadata_load

from dupr_cli import export
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.hub import check_repository, model_card
from tests.export.test_export import RECIPE, make_run


@dataclass
class Hub:
    """What the server was sent. refuse: HTTP status with which it answers commits."""

    url: str = ""
    created: list[dict[str, object]] = field(default_factory=list)
    commits: list[dict[str, bytes]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuse: int | None = None


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, value: object, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            self._answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "name": "me"})

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            body = self._body()
            if hub.refuse and self.path != "/api/validate-yaml":
                self._answer({"error": "no"}, hub.refuse)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer({"url": f"{hub.url}/me/model", "name": "me/model"})
            elif self.path.startswith("/api/models/me/model/preupload/"):
                files = json.loads(body)["files"]
                self._answer(
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for f in files
                        ]
                    }
                )
            elif self.path.startswith("/api/models/me/model/commit/"):
                lines = [json.loads(line) for line in body.splitlines()]
                hub.commits.append(
                    {
                        line["value"]["path"]: base64.b64decode(line["value"]["content"])
                        for line in lines
                        if line["key"] == "file"
                    }
                )
                self._answer(
                    {"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1", "success": True}
                )
            else:
                self._answer({"errors": [], "warnings": []})

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", state.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def test_push_makes_one_commit_of_weights_and_card(hub: Hub, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    result = export.run(
        RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors", push_to_hub="me/model"
    )
    assert [entry["name"] for entry in hub.created] == ["model"]
    assert len(hub.commits) == 1
    commit = hub.commits[0]
    assert commit["b.safetensors"] == (tmp_path / "b.safetensors").read_bytes()
    assert b"resnet18" in commit["README.md"]
    assert result.hub_url == f"{hub.url}/me/model/commit/1"
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "hf auth login"), (403, "may write"), (500, "")]
)
def test_refused_push_says_so_and_keeps_the_file(
    hub: Hub, tmp_path: Path, status: int, hint: str
) -> None:
    make_run(tmp_path / "run", "resnet18")
    hub.refuse = status
    with pytest.raises(
        RunError, match=rf"refused the push to me/model .HTTP {status}..*{hint}"
    ) as caught:
        export.run(
            RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors", push_to_hub="me/model"
        )
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "b.safetensors").is_file()


def test_unreachable_hub_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    make_run(tmp_path / "run", "resnet18")
    with pytest.raises(RunError, match="the push to me/model failed"):
        export.run(
            RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors", push_to_hub="me/model"
        )


def test_card_has_front_matter_and_code_that_compiles(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    card = model_card(read_weights(str(tmp_path / "run")), "me/model", "b.safetensors")
    assert isinstance(card, ModelCard)
    (tmp_path / "README.md").write_text(str(card))
    front_matter = metadata_load(tmp_path / "README.md")
    assert front_matter is not None
    assert front_matter["library_name"] == "dupr"
    code = str(card).split("```python")[1].split("```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", ""])
def test_repository_names(name: str) -> None:
    with pytest.raises(UsageError, match="write it as OWNER/NAME"):
        check_repository(name)
