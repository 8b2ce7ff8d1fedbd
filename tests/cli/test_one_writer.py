"""One output, one writer: a second command on the same output is refused, and changes nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dupr_cli.artifacts.run import MetricsLog
from tests.support.processes import Forked
from tests.support.workspace import Workspace, signalled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("space") / "space", images=40)
    assert space.prepare().code == 0
    return space


def start(*words: object) -> Forked:
    return Forked([sys.executable, "-m", "dupr_cli", *words])


def wait_for(path: Path, process: Forked | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop(process: Forked) -> int:
    process.terminate()
    return process.wait(60)


def test_two_pretrain_on_one_run(space: Workspace) -> None:
    words = ["pretrain", space.root / "pretrain.yaml", "--data", space.shards, "--out", space.run,
             "--set", "train.steps=100000"]  # fmt: skip
    process = start(*words)
    wait_for(space.run / "metrics.jsonl", process)
    for options in ((), ("--overwrite",)):
        done = space.dupr(*words, *options)
        assert done.code == 2
        assert f"process {process.pid}" in done.output
    assert stop(process) == 75
    steps = [line["step"] for line in MetricsLog(space.run).read() if "loss" in line]
    assert len(steps) == len(set(steps))


def test_two_evaluate_on_one_output(space: Workspace) -> None:
    words = ["evaluate", "voc", "none", "--recipe", space.root / "evaluate.yaml", "--data",
             space.tree, "--out", space.evaluation, "--set", "train.iterations=100000"]  # fmt: skip
    process = start(*words)
    wait_for(space.evaluation / "01-none" / "seed-0" / "checkpoints", process)
    for options in ((), ("--overwrite",)):
        done = space.dupr(*words, *options)
        assert done.code == 2
        assert f"process {process.pid}" in done.output
    assert stop(process) == 75


def test_prepare_that_overwrites_leaves_a_running_one_alone(tmp_path: Path) -> None:
    """The fault behind this: it deleted the live work before it took the lock."""
    space = Workspace(tmp_path / "space", images=400)
    words = ["prepare", space.images, space.shards, "--set", "shard.max_samples=5",
             "--set", "image.max_side=20", "--workers", 1]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "dupr_cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(space.shards / ".prepare" / "state.json", process)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the second is refused
    done = space.dupr(*words, "--overwrite", "--set", "image.quality=50")
    process.send_signal(signal.SIGCONT)
    assert done.code == 2
    assert "is writing to it" in done.output
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, out + said
    assert space.dupr("prepare", "verify", space.shards).code == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_drops_no_image(tmp_path: Path, workers: int) -> None:
    """The fault behind this: SIGTERM was taken for an error of the image at hand, exit code 0."""
    space = Workspace(tmp_path / "space", images=300)
    options = ("--set", "shard.max_samples=5", "--workers", workers)
    blocks, delay = space.shards / ".prepare" / "blocks", random.Random(0)
    for _ in range(6):
        before = len(list(blocks.glob("*.tar")))

        def moves(before: int = before) -> bool:
            return len(list(blocks.glob("*.tar"))) > before

        with signalled(delay.uniform(0, 0.02), when=moves):
            code = space.prepare(*options).code
        if code == 0:  # it was faster than the signal
            break
        assert code == 75
    else:
        assert not (space.shards / "manifest.json").exists()
    done = space.prepare(*options)
    assert done.code == 0
    skipped = space.shards / "skipped.jsonl"
    assert skipped.read_text() == ""
    quiet = tmp_path / "quiet"
    space.dupr("prepare", space.images, quiet, "--set", "shard.max_samples=5", "--workers", 1)
    names = {path.name for path in quiet.iterdir()}
    assert {path.name for path in space.shards.iterdir()} == names
    assert all((space.shards / n).read_bytes() == (quiet / n).read_bytes() for n in names)
