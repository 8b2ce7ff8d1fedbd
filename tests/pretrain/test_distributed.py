"""Several real processes: what travels between them, and that a run does not depend on them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dupr_cli.artifacts.run import MetricsLog, list_checkpoints
from tests.support import command_line
from tests.support.images import write_grainy_shards
from tests.support.processes import Forked, finished, forked, ranks
from tests.support.ranks import check_all
from tests.support.recipes import SMALL_NETWORK, TINY

pytestmark = pytest.mark.slow

# One thread each: the number of threads changes the order of sums, and so the rounding.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("processes", [2, 3])
def test_what_travels_between_processes(processes: int) -> None:
    finished(ranks(check_all, processes))


@pytest.fixture(scope="module")
def grainy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grainy_shards(tmp_path_factory.mktemp("grainy"))


def pretrain(shards: Path, out: Path, *options: object, launcher: str = "") -> list[str]:
    words: list[object] = [sys.executable]
    if launcher:
        words += ["-m", "torch.distributed.run", "--standalone", *launcher.split()]
    words += ["-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke", "--data", shards, "--out", out]
    for override in (*TINY, SMALL_NETWORK):
        words += ["--set", override]
    return [str(word) for word in (*words, *options)]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "latest" / "model.safetensors")


# A small rate: a network at its random start multiplies rounding by a hundred in each step.
SAME = ("--steps", 5, "--checkpoint-every", 1, "--set", "method.views.size=64",
        "--set", "data.batch_size=16", "--set", "method.queue_length=64",
        "--set", "train.log_every=1",
        # Some pairs share too little: the processes have different numbers of valid images.
        "--set", "method.views.min_overlap=0.6", "--set", "method.views.overlap_attempts=1",
        "--set", "optimizer.lr=3e-5", "--set", "optimizer.warmup_steps=0",
        "--set", "train.probe_every=100", "--set", "method.momentum=0.9")  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        ("method.batch_norm.groups=2",),
        ("method.batch_norm.groups=1", "method.batch_norm.sync=true"),
        ("method.batch_norm.groups=4", "method.symmetric=true", "train.accumulate=2"),
    ],
    ids=["groups", "sync", "symmetric in parts"],
)
def test_two_processes_and_one_give_the_same_run(
    tmp_path: Path, grainy_shards: Path, method: tuple[str, ...]
) -> None:
    options = [*SAME, *(word for key in method for word in ("--set", key))]
    one, two = tmp_path / "one", tmp_path / "two"
    command_line.pretrain(grainy_shards, one, *options, "--checkpoint-every", 5)
    # The processes compare their parameters and queues bit for bit at each checkpoint.
    if "sync" in str(method):
        command = pretrain(grainy_shards, two, *options, launcher="--nproc-per-node 2")
        subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
    else:
        finished(ranks(pretrain(grainy_shards, two, *options), 2))
    losses = [
        [line["loss"] for line in MetricsLog(out).read() if "loss" in line] for out in (one, two)
    ]
    assert len(losses[0]) == 5
    assert 0 < MetricsLog(one).latest()["overlap"] < 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    whole, spread = final(one), final(two)
    for name, values in whole.items():
        scale = max(1.0, float(values.double().abs().max()))
        parameter = name.startswith(("query", "key")) and "running" not in name
        tolerance = (1e-5 if parameter else 1e-4) * scale
        assert float((values.double() - spread[name].double()).abs().max()) < tolerance, name


def test_two_processes_continue_exactly(tmp_path: Path, grainy_shards: Path) -> None:
    """Killed, stopped through the launcher, and continued."""
    options = ("--steps", 9, "--set", "data.workers=1")
    finished(ranks(pretrain(grainy_shards, tmp_path / "whole", *options), 2))
    cut = tmp_path / "cut"

    def wait_for_checkpoint(has_ended: Callable[[], int | None]) -> None:
        before = len(list_checkpoints(cut)) and max(list_checkpoints(cut)).name
        deadline = time.monotonic() + 120
        while not list_checkpoints(cut) or max(list_checkpoints(cut)).name == before:
            assert time.monotonic() < deadline, "no checkpoint"
            assert has_ended() is None, "it ended by itself"
            time.sleep(0.02)

    processes = ranks(pretrain(grainy_shards, cut, *options), 2)
    wait_for_checkpoint(processes[0].poll)
    for process in processes:
        process.kill_group()
    launched = Forked(pretrain(grainy_shards, cut, *options, "--nproc", 2), ENVIRONMENT)
    wait_for_checkpoint(launched.poll)
    launched.terminate()
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 75, errors
    assert "The same command continues" in errors
    finished(ranks(pretrain(grainy_shards, cut, *options), 2))
    whole, continued = final(tmp_path / "whole"), final(cut)
    for name, values in whole.items():
        assert torch.equal(values, continued[name]), name


def test_another_number_of_processes_goes_on_and_says_what_is_not_exact(
    tmp_path: Path, grainy_shards: Path
) -> None:
    out = tmp_path / "run"
    command_line.pretrain(grainy_shards, out, "--stop-after", 3, code=75)
    said = finished(ranks(pretrain(grainy_shards, out), 2))
    assert "had 1 processes and now has 2" in said
    assert json.loads((out / "latest" / "state.json").read_text())["processes"] == 2


def test_a_batch_that_cannot_be_shared_is_said_once(tmp_path: Path, grainy_shards: Path) -> None:
    out = tmp_path / "run"
    done = command_line.pretrain(grainy_shards, out, "--nproc", 3, code=2)
    assert (
        "data.batch_size is 8, which does not divide equally among 3 processes. Use 6 and "
        "method.batch_norm.groups=3, for example." in done.stderr
    )
    advised = ("--set", "data.batch_size=6", "--set", "method.batch_norm.groups=3")
    command_line.pretrain(grainy_shards, out, "--nproc", 3, "--dry-run", *advised)
    groups = ("--set", "method.batch_norm.groups=1")
    done = command_line.pretrain(grainy_shards, out, "--nproc", 2, *groups, code=2)
    assert "groups of the global batch do not divide" in done.stderr
    assert not out.exists()


def test_a_failure_in_a_process_is_one_message(tmp_path: Path, grainy_shards: Path) -> None:
    out = tmp_path / "run"
    options = ("--set", "optimizer.lr=1e30", "--set", "train.max_bad_steps=2")
    command = pretrain(grainy_shards, out, "--nproc", 2, *options)
    done = forked(command, environment=ENVIRONMENT)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error:") == 1
    assert "was not finite in 2 steps in a row" in done.stderr


def test_two_machines_are_one_run(grainy_shards: Path, tmp_path: Path) -> None:
    """The same command on each, as the pages give it; here both are this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    options = [*SAME, "--set", "method.batch_norm.groups=2", "--device", "cpu"]
    several = ("--nnodes", 2, "--nproc", 1, "--rendezvous", place)
    command = pretrain(grainy_shards, tmp_path / "two", *options, *several)
    environment = {**os.environ, **ENVIRONMENT}
    machines = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    command_line.pretrain(grainy_shards, tmp_path / "one", *options)
    two, one = (
        [line["loss"] for line in MetricsLog(tmp_path / out).read() if "loss" in line]
        for out in ("two", "one")
    )
    assert len(one) == 5
    assert two == pytest.approx(one, rel=1e-5)
