"""The Hub through the real huggingface_hub client, against a local server with its endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load

from dupr_cli import export
from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.weights import read_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.hub import check_options
from dupr_cli.export.types import ExportResult, PushOptions
from dupr_cli.recipe import ExportRecipe, load_recipe
from tests.support.command_line import dupr
from tests.support.hub_client import wait_briefly
from tests.support.processes import as_main, forked
from tests.support.weights import make_run

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNED = "X-Amz-Signature=m4rked"


@dataclass
class Hub:
    """What the server was sent, and what it holds.

    refuse: HTTP status with which it answers commits. cut: uploads of large files end in the
    middle. branches: files by branch. large: contents by sha256.
    """

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    large: dict[str, bytes] = field(default_factory=dict)
    refuse: int | None = None
    cut: bool = False

    def files(self, revision: str) -> dict[str, bytes]:
        return self.branches.get("main" if revision == COMMIT else revision, {})


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # Without keep-alive: a closed server must not go on answering.
        protocol_version = "HTTP/1.0"

        def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _answer(self, value: object, status: int = 200) -> None:
            self._send(json.dumps(value).encode(), status, Content_Type="application/json")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            api = re.fullmatch(r"/api/models/me/model(/tree/([^?/]+))?(\?.*)?", self.path)
            found = re.fullmatch(r"/me/model/resolve/([^/]+)/(.+)", self.path)
            if api and api[2]:
                files = hub.files(api[2])
                self._answer(
                    [{"type": "file", "path": n, "size": len(d), "oid": COMMIT}
                     for n, d in files.items()]
                )  # fmt: skip
            elif api:
                self._answer({"id": "me/model", "sha": COMMIT, "siblings": [], "private": False})
            elif found and found[2] in (files := hub.files(found[1])):
                data = files[found[2]]
                self._send(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self._send(b"{}", 404, X_Error_Code="EntryNotFound" if found else "RepoNotFound")

        def do_PUT(self) -> None:
            if hub.cut:
                self.rfile.read(1000)
                self.connection.close()
                return
            data = self._body()
            hub.large[hashlib.sha256(data).hexdigest()] = data
            self._send(b"", ETag='"1"')

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            body = self._body()
            place = self.path.partition("/api/models/me/model/")[2]
            if hub.refuse and self.path != "/api/validate-yaml":
                self._answer({"error": "no"}, hub.refuse)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer({"url": f"{hub.url}/me/model", "name": "me/model"})
            elif place.startswith("branch/"):
                hub.branches.setdefault(place.removeprefix("branch/"), dict(hub.branches["main"]))
                self._answer({})
            elif place.startswith("preupload/"):
                files = json.loads(body)["files"]
                large = (".safetensors", ".pkl", ".pth", ".onnx")
                self._answer(
                    {"files": [
                        {"path": f["path"], "shouldIgnore": False,
                         "uploadMode": "lfs" if f["path"].endswith(large) else "regular"}
                        for f in files
                    ]}
                )  # fmt: skip
            elif self.path == "/me/model.git/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                self._answer(
                    {"transfer": "basic", "objects": [
                        {"oid": o["oid"], "size": o["size"],
                         **({} if o["oid"] in hub.large else {"actions": {"upload": {
                             "href": f"{hub.url}/lfs/{o['oid']}?{SIGNED}", "header": {}}}})}
                        for o in objects
                    ]}
                )  # fmt: skip
            elif place.startswith("commit/"):
                self._commit(place.removeprefix("commit/").partition("?")[0], body)
            else:
                self._answer({"errors": [], "warnings": []})

        def _commit(self, branch: str, body: bytes) -> None:
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                else:
                    hub.messages.append(value["summary"])
            hub.commits.append((branch, files))
            hub.branches.setdefault(branch, {}).update(files)
            self._answer(
                {"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1", "success": True}
            )

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", state.url)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def recipe(*changes: str) -> ExportRecipe:
    return load_recipe(ExportRecipe, "default", list(changes))


RECIPE = recipe("formats=[torchvision, timm, detectron2]")


def push(tmp_path: Path, **options: Any) -> ExportResult:
    if not (tmp_path / "run").exists():
        make_run(tmp_path / "run", "resnet18")
        (tmp_path / "run" / "recipe.yaml").write_text("stage: pretrain\n")
    return export.run(
        RECIPE, str(tmp_path / "run"), tmp_path / "out", push=PushOptions("me/model", **options),
        overwrite=True,
    )  # fmt: skip


def test_push_is_one_commit_of_everything(hub: Hub, tmp_path: Path) -> None:
    result = push(tmp_path)
    assert [entry["name"] for entry in hub.created] == ["model"]
    ((branch, files),) = hub.commits
    assert branch == "main"
    assert sorted(files) == [
        "README.md", "config.json", "detectron2/backbone.pkl", "export.json", "model.safetensors",
        "recipe.yaml", "torchvision/backbone.safetensors",
    ]  # fmt: skip
    for name, data in files.items():
        assert data == (tmp_path / "out" / name).read_bytes()
    assert hub.messages == ["dupr: resnet18, query encoder, step 5"]
    assert result.hub_url == f"{hub.url}/me/model/commit/1"
    assert hub.tokens == {"Bearer hf_secret"}


def test_large_files_take_their_own_way_and_once(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path)
    uploaded = dict(hub.large)
    # timm's file has torchvision's names, so it is the same file: stored once for both.
    assert len(uploaded) == 2
    assert set(uploaded.values()) == {
        data for name, data in hub.commits[0][1].items() if name.endswith((".safetensors", ".pkl"))
    }
    push(tmp_path)
    assert hub.large == uploaded
    assert hub.commits[0][1] == hub.commits[-1][1]


def test_private_revision_message_and_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_other")
    push(tmp_path, private=True, revision="v2", commit_message="Second", token_from="MY_TOKEN")
    assert hub.created[0].get("private") is True or hub.created[0]["visibility"] == "private"
    assert hub.commits[0][0] == "v2"
    assert hub.messages == ["Second"]
    assert hub.tokens == {"Bearer hf_other"}
    assert "hf_other" not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.*[dn]")
                                     if p.suffix != ".safetensors")  # fmt: skip


def test_no_token_is_printed_or_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_m4rkedm4rkedm4rkedm4rked"
    monkeypatch.setenv("MY_TOKEN", token)
    make_run(tmp_path / "run", "resnet18")
    (tmp_path / "run" / "recipe.yaml").write_text("stage: pretrain\n")
    done = dupr(
        "export", tmp_path / "run", "--out", tmp_path / "out", "--push-to-hub", "me/model",
        "--token-from-env", "MY_TOKEN", "-v",
    )  # fmt: skip
    assert hub.tokens == {f"Bearer {token}"}
    assert "m4rked" not in done.stdout + done.stderr
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"m4rked" not in path.read_bytes()


def test_what_was_pushed_comes_back_as_weights(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path)
    pushed = tmp_path / "out" / "torchvision" / "backbone.safetensors"
    back = read_weights("hf://me/model/torchvision/backbone.safetensors")
    assert back.sha256 == read_weights(str(pushed)).sha256 == read_weights("hf://me/model").sha256
    timms = read_weights("hf://me/model/model.safetensors").tensors
    assert all(torch.equal(timms[name], tensor) for name, tensor in back.tensors.items())
    result = export.run(
        recipe(), "hf://me/model/torchvision/backbone.safetensors", tmp_path / "again.safetensors"
    )
    assert (tmp_path / "again.safetensors").read_bytes() == pushed.read_bytes()
    assert result.architecture == "resnet18"


def in_a_process_of_its_own(code: str) -> str:
    """With the address and the empty cache that the hub's fixture gave to the client."""
    done = forked(as_main(code))
    assert done.returncode == 0, done.stderr
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--me--model", "snapshots", COMMIT)
    assert cached.is_dir()  # the files came from the server
    return done.stdout


def test_autobackbone_loads_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    export.run(
        recipe("formats=[transformers]"), str(tmp_path / "run"), tmp_path / "out",
        push=PushOptions("me/model"),
    )  # fmt: skip
    code = """from transformers import AutoBackbone
model = AutoBackbone.from_pretrained("me/model")
print(type(model).__name__, model.channels)"""
    printed = in_a_process_of_its_own(code)
    assert printed == "ResNetBackbone [64, 128, 256, 512]\n"


def test_timm_loads_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path)
    code = """import timm
model = timm.create_model("hf-hub:me/model", pretrained=True)
print(model.num_features, model.pretrained_cfg["mean"])"""
    printed = in_a_process_of_its_own(code)
    assert printed in ("512 [0.4, 0.4, 0.4]\n", "512 (0.4, 0.4, 0.4)\n")


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "hf auth login"), (403, "write access"), (500, "")]
)
def test_refused_push_says_so_and_keeps_the_files(
    hub: Hub, tmp_path: Path, status: int, hint: str
) -> None:
    hub.refuse = status
    with pytest.raises(
        RunError, match=rf"refused the push to me/model .HTTP {status}..*{hint}"
    ) as caught:
        push(tmp_path)
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not hub.commits


def test_connection_cut_in_the_middle_leaves_the_repository_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_briefly(monkeypatch)
    hub.cut = True
    with pytest.raises(RunError, match=r"the push to me/model failed|refused the push") as caught:
        push(tmp_path)
    assert "m4rked" not in str(caught.value)
    assert hub.commits == []
    assert hub.branches["main"] == {}
    hub.cut = False
    push(tmp_path)
    assert len(hub.commits) == 1


def test_unreachable_hub_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="the push to me/model failed"):
        push(tmp_path)


def evaluated(folder: Path, sha256: str) -> Path:
    folder.mkdir(parents=True)
    used = DatasetIdentity("voc", "test", 20, 30, "d")
    Results(
        protocol="voc-tiny",
        metric="VOC07 11-point AP",
        train=used,
        test=used,
        classes=["cat"],
        results=[
            WeightsResult("runs/mine", sha256, "resnet18", {"AP": 12.5, "AP50": 30.0}, {},
                          deviations={"AP": 0.25}),
            WeightsResult("none", None, "resnet18", {"AP": 10.0, "AP50": 25.0}, {}),
        ],
        recipe={},
        recipe_sha256="",
        seeds=[0, 1],
        dupr_version="0",
        environment={},
        changes={"train.lr": [0.02, 0.01]},
    ).write(folder)  # fmt: skip
    return folder


def written(tmp_path: Path, formats: str, *results: Path, local_only: bool = True) -> Path:
    """The folder that is pushed, of a run with an evaluation beside it."""
    make_run(tmp_path / "run", "resnet18")
    (tmp_path / "run" / "recipe.yaml").write_text("stage: pretrain\n")
    evaluated(tmp_path / "eval", read_weights(str(tmp_path / "run")).sha256)
    evaluated(tmp_path / "other", "of other weights")
    export.run(
        recipe(f"formats=[{formats}]", "card.license=cc-by-4.0", "card.datasets=[me/photos]"),
        str(tmp_path / "run"), tmp_path / "out", push=PushOptions("me/model"),
        local_only=local_only, results=results,
    )  # fmt: skip
    return tmp_path / "out"


def test_card_front_matter_and_results(tmp_path: Path) -> None:
    folder = written(tmp_path, "torchvision")
    front = metadata_load(folder / "README.md")
    assert front is not None
    assert front["license"] == "cc-by-4.0"
    assert front["datasets"] == ["me/photos"]
    assert front["library_name"] == "dupr"
    assert {"dupr", "resnet18", "object-detection"} <= set(front["tags"])
    (entry,) = front["model-index"]
    assert entry["name"] == "model"
    values = {m["type"]: m["value"] for r in entry["results"] for m in r["metrics"]}
    assert values == {"AP": 12.5, "AP50": 30.0}
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is not None
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.dataset_split) == ("voc", "test")
    assert first.metric_args == {
        "seeds": 2, "standard_deviation": 0.25, "random_weights": 10.0
    }  # fmt: skip
    assert "| **this** | 12.5 ± 0.2 | 30.0 |" in card.text
    assert "| random weights | 10.0 | 25.0 |" in card.text
    assert "train.lr is 0.01, not 0.02" in card.text
    assert "10.1109/TPAMI.2022.3164911" in card.text
    assert sorted(p.name for p in (folder / "results").iterdir()) == ["01-voc-tiny.json"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == {"stage": "pretrain"}


def test_card_is_valid(hub: Hub, tmp_path: Path) -> None:
    card = ModelCard.load(written(tmp_path, "torchvision") / "README.md")
    card.validate()


def test_results_of_other_weights_are_refused_when_given(tmp_path: Path) -> None:
    other = evaluated(tmp_path / "else" / "eval", "of other weights")
    with pytest.raises(UsageError, match="not an evaluation of"):
        written(tmp_path, "torchvision", other)
    assert not (tmp_path / "out").exists()


def test_every_block_of_the_card_runs_as_pasted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats that Python loads by name from the server, the others in a copy of its files."""
    formats = "torchvision, timm, transformers, detectron2, mmdetection, onnx"
    folder = written(tmp_path, formats, local_only=False)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    text = (Path(moved) / "README.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, re.S)
    assert [language for language, _ in blocks].count("python") == 5
    code = "\n".join(block for language, block in blocks if language == "python")
    assert code.count("me/model") == 5
    monkeypatch.chdir(moved)
    in_a_process_of_its_own(code)
    for language, block in blocks:
        if language == "yaml":
            assert (Path(moved) / yaml.safe_load(block)["MODEL"]["WEIGHTS"]).is_file()
    checkpoint = re.search(r'checkpoint="(.+?)"', text)
    assert checkpoint is not None
    assert (Path(moved) / checkpoint[1]).is_file()


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", ""])
def test_repository_names(name: str) -> None:
    with pytest.raises(UsageError, match="write it as OWNER/NAME"):
        check_options(PushOptions(name))


def test_token_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(UsageError, match="NO_TOKEN: this environment variable is not set"):
        check_options(PushOptions("me/model", token_from="NO_TOKEN"))
