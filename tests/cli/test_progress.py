"""Progress as it is drawn on terminals of different widths and written to logs, by a set clock."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from dupr_cli.cli.console import ConsoleReporter, _LiveTask
from dupr_cli.pace import Pace, duration, fitted
from dupr_cli.progress import Task

STATUS = "retrieval res4 34% res5 40%  loss 8.12  image 3.20 + patch 4.92  lr 0.03  512 images/s"


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def work(task: Task | Pace, clock: Clock, updates: int, seconds: float, status: str = "") -> None:
    """`updates` units, each after `seconds`."""
    for _ in range(updates):
        clock.now += seconds
        if isinstance(task, Pace):
            task.advance(1)
        else:
            task.advance(1, status)


def on_terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, emoji=False)


@contextmanager
def drawn(width: int, done: int = 0, total: int = 5000) -> Iterator[tuple[Task, Clock, Console]]:
    clock, console = Clock(), on_terminal(width)
    reporter = ConsoleReporter(0, console, clock)
    with reporter.task("pretrain", total, "steps", done) as task:
        yield task, clock, console


def line(task: Task, console: Console) -> str:
    """The live line as it is now, without colours."""
    assert isinstance(task, _LiveTask)
    # Another console, as the live display of the first one also draws what is printed there.
    beside = on_terminal(console.width)
    beside.print(task)
    assert isinstance(beside.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;]*m", "", beside.file.getvalue())


def test_80_columns_keep_count_time_left_and_retrieval() -> None:
    with drawn(80) as (task, clock, console):
        work(task, clock, 121, 0.5, STATUS)
        shown = line(task, console)
    assert shown.splitlines() == [
        "pretrain 121/5000 steps  40:39 left  retrieval res4 34% res5 40%  2/s  loss 8.12"
    ]


def test_80_columns_cut_what_is_too_long() -> None:
    status = "retrieval res2 14% res3 24% res4 34% res5 40%  loss 8.12"
    with drawn(80) as (task, clock, console):
        work(task, clock, 121, 0.5, status)
        shown = line(task, console)
    assert shown.splitlines() == [
        "pretrain 121/5000 steps  40:39 left  retrieval res2 14% res3 24% res4 34% res5 …"
    ]


def test_120_columns_show_the_losses_too() -> None:
    with drawn(120) as (task, clock, console):
        work(task, clock, 121, 0.5, STATUS)
        shown = line(task, console)
    assert len(shown.splitlines()) == 1
    assert len(shown.rstrip()) <= 120
    assert "2/s  loss 8.12  image 3.20 + patch 4.92" in shown
    assert "━" not in shown


def test_wide_terminals_show_all() -> None:
    with drawn(160) as (task, clock, console):
        work(task, clock, 2500, 0.5, STATUS)
        shown = line(task, console)
    for part in ("2500/5000", "━" * 10 + " ", "20:50 left", "2/s", *STATUS.split("  ")):
        assert part in shown


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_a_line_never_wraps(width: int) -> None:
    with drawn(width) as (task, clock, console):
        work(task, clock, 100, 0.5, STATUS)
        assert len(line(task, console).splitlines()) == 1


def test_the_live_display_draws_the_line() -> None:
    with drawn(80) as (task, clock, console):
        work(task, clock, 121, 0.5, STATUS)
    assert isinstance(console.file, io.StringIO)
    assert "retrieval res4 34%" in console.file.getvalue()


def test_work_done_before_a_continuation_does_not_count_as_fast() -> None:
    with drawn(80, done=4000) as (task, clock, console):
        work(task, clock, 1, 20.0)  # starting takes long
        assert "left" not in line(task, console)
        work(task, clock, 4, 0.5)
        shown = line(task, console)
        assert shown.startswith("pretrain 4005/5000 steps")
        assert "8:17 left  2/s" in shown


def test_a_pause_does_not_count_as_slow() -> None:
    with drawn(80) as (task, clock, console):
        work(task, clock, 101, 0.5)
        clock.now += 60
        work(task, clock, 1, 0.5)
        assert "40:49 left  2/s" in line(task, console)
        work(task, clock, 50, 0.5)
        assert "2/s" in line(task, console)


def test_the_rate_is_of_the_last_half_minute() -> None:
    clock = Clock()
    pace = Pace(clock)
    work(pace, clock, 1000, 0.1)
    work(pace, clock, 100, 0.2)
    work(pace, clock, 100, 0.4)
    assert pace.rate == pytest.approx(2.5, rel=0.01)


def test_work_that_becomes_much_slower_is_no_pause() -> None:
    clock = Clock()
    pace = Pace(clock)
    work(pace, clock, 1000, 0.1)
    work(pace, clock, 2, 5.0)
    assert pace.rate == pytest.approx(0.2)


def test_bursts_are_no_pauses() -> None:
    """Engines report many images at once, then none for a while."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(20):
        clock.now += 2
        for _ in range(100):
            pace.advance(1)
    assert pace.rate == pytest.approx(50, rel=0.05)


def test_a_log_has_lines_with_all_of_the_status() -> None:
    clock, file = Clock(), io.StringIO()
    reporter = ConsoleReporter(0, Console(file=file, width=80, emoji=False), clock)
    with reporter.task("pretrain", 100, "steps", 40) as task:
        work(task, clock, 60, 0.5, STATUS)
    lines = file.getvalue().splitlines()
    assert lines == [
        f"pretrain 70/100 steps  2/s  0:15 left  {STATUS}",
        f"pretrain 100/100 steps  2/s  done  {STATUS}",
    ]


def test_parts_are_taken_by_rank_up_to_the_first_that_does_not_fit() -> None:
    parts = [(0, "count"), (9, "bar"), (1, "left"), (2, "a long status"), (3, "x")]
    assert fitted(parts, 100) == [0, 1, 2, 3, 4]
    assert fitted(parts, 12) == [0, 2]
    assert fitted(parts, 3) == [0]


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125, "2:05"), (7325, "2:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_wraps_messages_between_words_and_leaves_paths_whole() -> None:
    console = on_terminal(40)
    path = "/photos/" + "long" * 20 + "/image.jpg"
    ConsoleReporter(0, console).warning(
        f"the image {path} is damaged and was left out of the shards."
    )
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert [line.rstrip() for line in shown.splitlines()] == [
        "warning: the image",
        path,
        "is damaged and was left out of the",
        "shards.",
    ]


def test_a_log_keeps_a_message_on_one_line() -> None:
    console = Console(file=io.StringIO(), width=40, emoji=False)
    ConsoleReporter(0, console).info("word " * 30)
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_says_that_pytorch_is_loaded_and_forgets_it(tmp_path: Path, quiet: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dupr_cli", "inspect", "weights", tmp_path / "none.safetensors",
         *(["--quiet"] if quiet else [])],
        capture_output=True, check=False, env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    assert done.returncode == 2
    said, erased, rest = done.stderr.decode().partition("\r\x1b[K")
    assert (said == "loading PyTorch ..." and "error:" in rest) or (quiet and not erased)


def test_a_notebook_has_one_line_that_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reporter = ConsoleReporter(0, Console(force_jupyter=True, width=80), clock)
    with reporter.task("pretrain", 100, "steps") as task:
        work(task, clock, 90, 0.25, STATUS)
        work(task, clock, 10, 0.25, "short")
    written = capsys.readouterr().out
    assert written.count("\n") == 1
    lines = written.removesuffix("\n").split("\r")[1:]
    assert len(lines) == 51  # twice a second, and at the end
    longest = max(map(len, lines))
    shorter = next(line for line in lines if "short" in line)
    assert len(shorter) == longest  # blanks cover the rest of the line before
    assert lines[-1].rstrip() == "pretrain 100/100 steps  ━━━━━━━━━━━━━━━━━━━━  done  short  4/s"
