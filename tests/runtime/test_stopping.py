"""Signals: once is asked, twice within a moment is once, and again later means at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dupr_cli.artifacts.run import MetricsLog, list_checkpoints
from dupr_cli.errors import StoppedRunError
from dupr_cli.runtime.stopping import Limits, Stop, StopSignal, raise_if_stopped, stoppable
from tests.support.processes import Forked
from tests.support.recipes import TINY
from tests.support.workspace import signalled

AT_ONCE = "SIGTERM: finishing this step, then saving it\n"
LOOP = """
import sys, time
from dupr_cli.errors import StoppedRunError
from dupr_cli.runtime.stopping import Limits, Stop
with Stop(Limits(), launched=sys.argv[1] == "launched") as stop:
    print("in", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        time.sleep(0.01)
print("code", stop.code, flush=True)
"""


def loop(seconds: float, launched: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, launched, str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_twice_within_a_moment_is_once() -> None:
    process = loop(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == (f"code {signal.SIGTERM}\n", AT_ONCE)


def test_a_third_time_ends_at_once_and_says_so() -> None:
    process = loop(30)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    out, said = process.communicate(timeout=10)
    assert (out, process.returncode) == ("", 128 + signal.SIGTERM)
    assert said == (f"{AT_ONCE}error: SIGTERM came again: ended at once. Unsaved work is lost.\n")


@pytest.mark.slow
def test_a_second_time_after_seconds_ends_at_once() -> None:
    process = loop(30)
    process.send_signal(signal.SIGINT)
    time.sleep(3.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT came again" in said


def test_on_a_terminal_what_is_said_takes_the_place_of_the_live_line() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, "alone", "0.5"], stdout=subprocess.PIPE, stderr=follower
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert os.read(leader, 1000) == b"\r\x1b[K" + AT_ONCE.replace("\n", "\r\n").encode()
    os.close(leader)
    os.close(follower)


def test_under_a_launcher_repetitions_are_the_launchers_part() -> None:
    process = loop(1.0, "launched")
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.communicate(timeout=20)[0] == f"code {signal.SIGTERM}\n"


def test_a_signal_passes_through_code_that_catches_errors() -> None:
    """The fault behind `StopSignal`: a stop was taken for an error of the image at hand."""

    def read() -> str:
        try:
            time.sleep(5)
        except Exception:
            return "a damaged image"
        return "an image"

    with (
        signalled(0.2),
        pytest.raises(StoppedRunError, match=r"^stopped by SIGTERM\. Kept\.$"),
        stoppable("Kept."),
    ):
        read()


def lose_an_exception() -> None:
    """Spend 0.6 seconds in a finaliser, out of which no exception passes."""

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.6)

    slow = Slow()
    del slow


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_raised_again() -> None:
    def work() -> None:
        lose_an_exception()
        raise_if_stopped()
        pytest.fail("the signal was lost")

    with signalled(0.2), pytest.raises(StoppedRunError), stoppable("Kept."):
        work()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_dropped_before_a_training_loop_stops_its_first_step() -> None:
    def work() -> None:
        lose_an_exception()
        with Stop(Limits(), launched=False) as stop:
            assert stop.code == signal.SIGTERM

    with signalled(0.2), pytest.raises(StoppedRunError), stoppable("Kept."):
        work()


def test_ctrl_c_has_its_own_exit_code() -> None:
    with (
        signalled(0.1, signal.SIGINT),
        pytest.raises(StoppedRunError) as error,
        stoppable("Kept."),
    ):
        time.sleep(5)
    assert error.value.exit_code == 130


def test_handlers_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(""):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_is_no_exception_that_code_may_handle() -> None:
    assert not issubclass(StopSignal, Exception)


def test_pretrain_told_twice_saves_its_step(tmp_path: Path, tiny_shards: Path) -> None:
    out = tmp_path / "run"
    words = ["pretrain", "dupr-r18-cpu-smoke", "--data", str(tiny_shards), "--out", str(out)]
    words += [word for override in TINY for word in ("--set", override)]
    words += ["--set", "train.steps=100000", "--set", "train.checkpoint_every=100000"]
    process = Forked([sys.executable, "-m", "dupr_cli", *words])
    deadline = time.monotonic() + 120
    while not any("loss" in line for line in MetricsLog(out).read()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said.replace("\n", " ")
    assert len(list_checkpoints(out)) == 1
