"""`dupr evaluate` as processes: killed, stopped and continued, on one process and on two."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command_line import dupr
from tests.support.labelled_scenes import make_tree
from tests.support.processes import Forked, finished, members_of_group, ranks
from tests.support.recipes import detection_recipe as recipe

pytestmark = pytest.mark.slow


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


def in_this_process(words: list[str]) -> str:
    """Run the command to its end; what it says."""
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
    in_this_process(command(folder, tree, folder / "out"))
    return facts(folder / "out")


def no_process_is_left(process: Forked) -> None:
    deadline = time.monotonic() + 20
    while members_of_group(process.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def test_killed_and_continued(tree: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    words = command(tmp_path, tree, tmp_path / "out")
    chance = random.Random(5)
    for _ in range(3):
        process = Forked(words)
        time.sleep(chance.uniform(0.5, 3))
        process.kill_group()
        no_process_is_left(process)
    in_this_process(words)
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
    said = in_this_process(words)
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
    assert "sha256 has changed" in in_this_process(words)
    assert facts(out) == whole


def test_two_processes_continue_exactly(tree: Path, tmp_path: Path) -> None:
    """Without interruption, and killed and then continued by the launcher."""
    of_two = {}
    for name in ("whole", "killed"):
        out = tmp_path / name
        words = command(tmp_path, tree, out, "--seeds", 1)
        processes = ranks(words, 2)
        if name == "killed":
            while not list(out.glob("*/seed-0/checkpoints/step-*")):
                assert processes[0].poll() is None, "it ended by itself"
                time.sleep(0.02)
            for process in processes:
                process.kill_group()
                no_process_is_left(process)
            processes = [Forked([*words, "--nproc", "2"], {"OMP_NUM_THREADS": "1"})]
        assert "Traceback" not in finished(processes)
        of_two[name] = facts(out)
    assert of_two["killed"] == of_two["whole"]
