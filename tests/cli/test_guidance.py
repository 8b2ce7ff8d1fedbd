"""What commands say about the next step: Next lines, what was learned, snippets, blame."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dupr_cli.pretrain.retrieval_check import learned
from tests.support.command_line import dupr, pretrain
from tests.support.images import noise_image
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import SMALL_DETECTOR

SMALL = "detector.backbone=timm:test_resnet"
NEXT = re.compile(r"^Next: (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next") / "two words"
    (folder / "photos").mkdir(parents=True)
    for number in range(24):
        noise_image(number).save(folder / "photos" / f"{number}.png")
    return folder


def _next(errors: str) -> list[str]:
    (found,) = NEXT.findall(errors)
    return shlex.split(found, comments=True)  # what follows is a comment, as in a shell


def test_each_stage_names_a_command_that_runs(folder: Path) -> None:
    done = dupr("prepare", folder / "photos", folder / "shards")
    assert _next(done.stderr) == ["dupr", "plan", str(folder / "shards")]
    done = pretrain(folder / "shards", folder / "run")
    assert "more than at the start" in " ".join(done.stdout.split())
    words = _next(done.stderr)
    words[words.index("--out") + 1] = str(folder / "backbone.safetensors")
    words[words.index("--to") + 1] = "safetensors"  # the small network is timm's
    done = dupr(*words[1:])
    assert _next(done.stderr)[:5] == ["dupr", "evaluate", "voc", str(folder / "run"), "none"]


def test_programs_and_dry_runs_get_no_advice(folder: Path) -> None:
    source, out = folder / "photos", folder / "unused"
    assert "Next:" not in dupr("prepare", source, out, "--dry-run").stderr
    done = dupr("prepare", source, out, "--json")
    assert "Next:" not in done.stderr + done.stdout
    assert json.loads(done.stdout)["samples"] == {"train": 24}
    assert "Next:" not in dupr("prepare", source, folder / "quiet", "--quiet").stderr


def test_a_snippet_runs_where_it_is_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dupr("prepare", folder / "photos", "shards")
    pretrain("shards", "run", "--set", "model.backbone=resnet18")
    for out, to in (("sub/mine.safetensors", ["torchvision"]), ("both", ["torchvision", "timm"])):
        options = [word for name in to for word in ("--to", name)]
        printed = dupr("export", "run", *options, "--out", out).stdout
        blocks = re.split(r"^\w+:$", printed, flags=re.MULTILINE)[1:]
        assert len(blocks) == len(to)
        for block in blocks:
            exec(compile(block, "printed", "exec"), {})
        for path in re.findall(r"(\S+) sha256", printed):
            assert Path(path).exists(), path


def test_what_is_not_pushed_says_where_it_lies(folder: Path, tmp_path: Path) -> None:
    dupr("prepare", folder / "photos", tmp_path / "shards")
    pretrain(tmp_path / "shards", tmp_path / "run")
    done = dupr(
        "export", tmp_path / "run", "--push-to-hub", "me/mine", "--local-only", "--out",
        tmp_path / "hub",
    )  # fmt: skip
    assert f"pushes {tmp_path / 'hub'} to me/mine; nothing was pushed yet" in done.stderr


@pytest.mark.parametrize(
    ("given", "blamed"),
    [
        (["--steps", "0"], "--steps 0: train.steps is 0"),
        (["--set", "train.steps=0"], "--set train.steps=0: train.steps is 0"),
        (["--workers", "-1"], "--workers -1: data.workers is -1"),
    ],
)
def test_the_option_that_was_given_is_blamed(given: list[str], blamed: str) -> None:
    done = dupr("pretrain", "dupr-r18-cpu-smoke", "--data", "x", "--out", "y", *given, code=2)
    assert blamed in done.stderr


def test_an_option_whose_value_is_no_yaml_is_blamed(tmp_path: Path) -> None:
    done = dupr(
        "evaluate", "voc", "none", "--data", tmp_path, "--out", "y", "--labels", "[5", code=2
    )
    assert "error: --labels [5: the value is not valid YAML." in done.stderr


def test_photos_are_never_proposed_as_an_output(folder: Path) -> None:
    photos = folder / "photos"
    message = dupr("pretrain", "voc-tiny", "--data", photos, "--out", "y", code=2).stderr
    assert "not for dupr pretrain" in message
    message = dupr("pretrain", "dupr-r18-cpu-smoke", "--data", photos, "--out", "y", code=2).stderr
    assert "dupr prepare" in message
    assert not message.rstrip("`.\n").endswith(str(photos))


def test_what_was_learned_compares_with_the_start() -> None:
    first = {"retrieval/res4": 0.02, "retrieval/res5": 0.05}
    last = {"retrieval/res4": 0.2, "retrieval/res5": 0.075, "loss": 1.0}
    pools = {"retrieval_pool/res4": 480.0, "retrieval_pool/res5": 120.0}
    assert learned(first, last | pools) == (
        "more than at the start: res4 2.0% -> 20.0%; "
        "not clearly more than at the start: res5 5.0% -> 7.5%"  # 9 patches of 120 in place of 6
    )
    assert learned({}, {"loss": 1.0}) == ""


def test_an_evaluation_says_what_comes_next(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "voc", 2, 2)
    settings = [part for key in (*SMALL_DETECTOR, SMALL) for part in ("--set", key)]
    done = dupr(
        "evaluate", "voc", "none", "--frozen", "--data", tree, "--out", tmp_path / "one", *settings
    )
    assert _next(done.stderr)[:3] == ["dupr", "report", str(tmp_path / "one")]
    dupr("report", tmp_path / "one", "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
