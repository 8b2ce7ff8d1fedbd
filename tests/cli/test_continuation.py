"""A run that is killed, stopped or damaged ends with the weights of one that was left alone.

Through the real command line, with real signals to real processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dupr_cli.artifacts.run import MetricsLog, list_checkpoints
from tests.support import command_line
from tests.support.images import write_shards
from tests.support.processes import Forked
from tests.support.recipes import SMALL_NETWORK, TINY

pytestmark = pytest.mark.slow

STEPS = 24
# Checkpoints take time to write and to flush; how often changes nothing of the weights.
SELDOM = ("--set", "train.checkpoint_every=12")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "tiny", 60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, torch.Tensor]:
    """The weights of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command_line.pretrain(shards, out, "--steps", STEPS, *SELDOM)
    return load_file(out / "latest" / "model.safetensors")


def pretrain(shards: Path, out: Path, *options: object) -> list[str]:
    words: list[object] = [sys.executable, "-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke"]
    words += ["--data", shards, "--out", out, "--steps", STEPS]
    for override in (*TINY, SMALL_NETWORK):
        words += ["--set", override]
    return [str(word) for word in (*words, *options)]


def assert_same(out: Path, whole: dict[str, torch.Tensor]) -> None:
    found = load_file(out / "latest" / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert torch.equal(values, found[name]), name
    steps = [line["step"] for line in MetricsLog(out).read() if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def test_killed_at_random_moments(
    tmp_path: Path, shards: Path, whole: dict[str, torch.Tensor]
) -> None:
    """Ten times, with another number of loader workers each time."""
    out, chance = tmp_path / "run", random.Random(0)
    for attempt in range(10):
        workers = f"data.workers={attempt % 3}"
        process = Forked(
            pretrain(shards, out, "--set", workers, "--set", "train.checkpoint_every=4")
        )
        # Some before the run has begun, some in its steps and checkpoints.
        begun = time.monotonic()
        while attempt % 3 and process.poll() is None and time.monotonic() < begun + 60:
            if (out / "metrics.jsonl").exists():
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        process.kill_group()
    command_line.pretrain(shards, out, "--steps", STEPS, *SELDOM)
    assert_same(out, whole)


def steps_logged(run: Path) -> int:
    """Lines of training steps: the probe of step 0 comes before any step can be saved."""
    return sum("loss" in line for line in MetricsLog(run).read())


def test_signals_stop_after_a_step_that_is_saved(
    tmp_path: Path, shards: Path, whole: dict[str, torch.Tensor]
) -> None:
    """One run, stopped by each of the signals that ask for it."""
    out, options = tmp_path / "run", ("--set", "data.workers=1", *SELDOM)
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)):
        before = steps_logged(out)
        process = Forked(pretrain(shards, out, *options))
        deadline = time.monotonic() + 120
        while steps_logged(out) <= before:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        saved = max(int(p.name.removeprefix("step-")) for p in list_checkpoints(out))
        assert saved < STEPS, "it finished before it was stopped"
        assert f"step {saved} of {STEPS} is saved" in errors
        at_once = f"{signal.Signals(number).name}: finishing this step, then saving it"
        assert errors.count(at_once) == 1
        assert errors.index(at_once) < errors.index("is saved")
    command_line.pretrain(shards, out, "--steps", STEPS, *SELDOM)
    assert_same(out, whole)


def flip_a_byte(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def truncate(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.safetensors").open("r+b") as file:
        file.truncate(5000)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


def test_damaged_checkpoints_are_passed_over(
    tmp_path: Path, shards: Path, whole: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "run"
    options = ("--steps", STEPS, "--stop-after", 11, "--set", "train.keep_checkpoints=9")
    stopped = command_line.pretrain(shards, out, *options, code=75).stderr
    assert "stopped by --stop-after 11; step 11 of 24 is saved" in stopped
    newest = list_checkpoints(out)[::-1]
    assert len(newest) == 6
    for checkpoint, damage in zip(newest, (flip_a_byte, truncate, lose_a_file), strict=False):
        damage(checkpoint)
    errors = command_line.pretrain(shards, out, "--steps", STEPS, *SELDOM).stderr
    for checkpoint in newest[:3]:
        assert str(checkpoint) in errors
        assert (checkpoint.parent / f"damaged-{checkpoint.name}").is_dir()
    assert "its sha256 has changed" in errors
    assert "continues from step 6" in errors
    assert_same(out, whole)


def test_a_time_limit_saves_and_the_run_goes_on(
    tmp_path: Path, shards: Path, whole: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "run"
    options = ("--steps", STEPS, "--max-hours", 0)
    errors = command_line.pretrain(shards, out, *options, code=75).stderr
    assert "stopped after --max-hours 0; step 1 of 24 is saved" in errors
    command_line.pretrain(shards, out, "--steps", STEPS, *SELDOM)
    assert_same(out, whole)


def test_a_run_of_the_future_is_continued(
    tmp_path: Path, shards: Path, whole: dict[str, torch.Tensor]
) -> None:
    """The clock was set back meanwhile."""
    out = tmp_path / "run"
    options = ("--steps", STEPS, *SELDOM)
    command_line.pretrain(shards, out, *options, "--stop-after", 7, code=75)
    for path in out.rglob("*"):
        os.utime(path, (4_000_000_000, 4_000_000_000), follow_symlinks=False)
    command_line.pretrain(shards, out, *options)
    assert_same(out, whole)


def test_old_checkpoints_are_thinned_out(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    command_line.pretrain(
        shards, out, "--steps", 12, "--set", "train.keep_checkpoints=2",
        "--set", "train.keep_every=4",
    )  # fmt: skip
    assert [p.name for p in list_checkpoints(out)] == [
        f"step-{step:08d}" for step in (4, 8, 10, 12)
    ]


def test_a_changed_recipe_goes_on_only_where_it_is_allowed(tmp_path: Path, shards: Path) -> None:
    out, change = tmp_path / "run", ("--set", "optimizer.lr=0.5")
    command_line.pretrain(shards, out, "--stop-after", 2, code=75)
    errors = command_line.pretrain(shards, out, *change, code=2).stderr
    assert "optimizer.lr: 0.06 there, 0.5 now" in errors
    assert "--allow-changed optimizer.lr" in errors
    errors = command_line.pretrain(
        shards, out, *change, "--allow-changed", "optimizer.lrr", code=2
    ).stderr
    assert "Did you mean optimizer.lr?" in errors
    command_line.pretrain(
        shards, out, *change, "--allow-changed", "optimizer.lr", "--stop-after", 2, code=75
    )
    recorded = json.loads((out / "environment.json").read_text())["changes"]
    assert recorded == [{"key": "optimizer.lr", "before": 0.06, "after": 0.5}]
    # From now on it is the recipe of the run; keys that only change rounding are free.
    free = ("--set", "train.accumulate=2", "--set", "train.log_every=1")
    errors = command_line.pretrain(shards, out, *change, *free).stderr
    assert "train.accumulate: 1 there, 2 now: the run continues equal to rounding" in errors
