"""`dupr evaluate` as processes: killed, stopped and continued, on one process and on two."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_line import dupr
from tests.support.labelled_scenes import make_tree
from tests.support.processes import Forked, members_of_group
from tests.support.recipes import detection_recipe as recipe

pytestmark = pytest.mark.slow

# Two threads each would wait for one another where tests run side by side.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("set") / "tree")


def command(folder: Path, tree: Path, out: Path, *more: object) -> list[str]:
    """An evaluation of a few seconds: two trials of random weights."""
    settings = recipe(8).model_dump(mode="json")
    settings["detector"]["backbone"] = "resnet18"
    settings["train"] |= {"log_every": 3, "checkpoint_every": 2}
    settings["test"] |= {"every": 5}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = ["evaluate", "voc", "none", "-r", file, "--data", tree, "--out", out, "--seeds", 2]
    return [sys.executable, "-m", "dupr_cli", *map(str, [*words, "--device", "cpu", *more])]


def finished(words: list[str]) -> str:
    """The same command in this process, to its end; what it says."""
    return dupr(*words[3:]).stderr


def facts(out: Path) -> dict[str, Any]:
    """results.json without timings."""
    values: dict[str, Any] = json.loads((out / "results.json").read_bytes())
    for row in values["results"]:
        del row["seconds"]
        for trial in row["trials"]:
            del trial["seconds"]
    return values


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    finished(command(folder, tree, folder / "out"))
    return facts(folder / "out")


def killed(words: list[str], when: Callable[[], bool]) -> None:
    """Start a command afresh and kill it with all its processes when something has come true."""
    process = subprocess.Popen(
        words,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while processes_with(words[words.index("--out") + 1]):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def processes_with(word: str) -> list[str]:
    """Processes whose command line has the word."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if word.encode() in place.read_bytes().split(b"\0"):
                found.append(place.parent.name)
    return found


def test_killed_and_continued(tree: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    words = command(tmp_path, tree, tmp_path / "out")
    chance = random.Random(5)
    for _ in range(3):
        process = Forked(words)
        time.sleep(chance.uniform(0.5, 3))
        process.kill_group()
        deadline = time.monotonic() + 20
        while members_of_group(process.pid):
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.05)
    finished(words)
    assert facts(tmp_path / "out") == whole
    assert not list(tmp_path.rglob("checkpoints"))


def test_stopped_by_each_signal(tree: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """One evaluation, stopped in its first trial and again in its second."""
    out = tmp_path / "out"
    words = command(tmp_path, tree, out)
    for seed, (number, code) in enumerate(((signal.SIGTERM, 75), (signal.SIGINT, 130))):
        process = Forked(words)
        while not list(out.glob(f"*/seed-{seed}/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert "is saved in" in errors
    said = finished(words)
    assert "continues from step" in said
    assert facts(out) == whole


def test_a_damaged_checkpoint_is_passed_over(
    tree: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(tmp_path, tree, out)
    dupr(*words[3:], "--max-hours", 0, code=75)
    (model,) = out.glob("*/seed-0/checkpoints/step-*/model.safetensors")
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert "sha256 has changed" in finished(words)
    assert facts(out) == whole


def test_two_processes_continue_exactly(tree: Path, tmp_path: Path) -> None:
    def results(name: str, kill: bool) -> dict[str, Any]:
        out = tmp_path / name
        words = command(tmp_path, tree, out, "--nproc", 2, "--seeds", 1)
        if kill:
            killed(words, lambda: bool(list(out.glob("*/seed-0/checkpoints/step-*"))))
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return facts(out)

    assert results("whole", kill=False) == results("killed", kill=True)
