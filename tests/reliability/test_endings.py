"""Every stage, ended in every way while it works, and continued to the bytes of a quiet call.

Not part of `make test`, because each case starts several processes; `make reliability` runs it and
prints the table of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability.conftest import COUNTS
from tests.reliability.stages import Inputs, Stage, stages
from tests.support.processes import Forked

SECONDS = 180
# What a command may end with, by how it was ended; 0 means that it was quicker.
STOPPED = {0, 75, 130}


class Afresh:
    """A command that is not forked, with the interface of `Forked`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> tuple[int, str]:
        _, errors = self._process.communicate(timeout=SECONDS)
        return self._process.returncode, errors


class InFork(Forked):
    def end(self) -> tuple[int, str]:
        _, errors = self.communicate(SECONDS)
        assert self.returncode is not None
        return self.returncode, errors


Running = Afresh | InFork


def start(stage: Stage, out: Path, workers: int | None) -> Running:
    command = stage.command(out, workers)
    return InFork(command) if stage.forks else Afresh(command)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_worker(pid: int) -> bool:
    """Whether a process has no children of its own and does not only watch over others'."""
    with suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not descendants(pid) and b"resource_tracker" not in command
    return False


def send(*numbers: signal.Signals) -> Callable[[Running], None]:
    def deliver(process: Running) -> None:
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
            time.sleep(0.2)

    return deliver


def kill_all(process: Running) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_a_worker(process: Running) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        workers = [pid for pid in descendants(process.pid) if is_worker(pid)]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            return
        time.sleep(0.005)


@dataclass(frozen=True)
class Ending:
    """How a call ends. codes: the exit codes that it may have."""

    name: str
    deliver: Callable[[Running], None]
    codes: frozenset[int]


ENDINGS = (
    # Before the work begins, nothing is there to be saved, and the default ends the process.
    Ending("SIGTERM", send(signal.SIGTERM), frozenset({*STOPPED, -signal.SIGTERM})),
    Ending("SIGINT", send(signal.SIGINT), frozenset(STOPPED)),
    Ending("SIGINT twice", send(signal.SIGINT, signal.SIGINT), frozenset(STOPPED)),
    Ending("SIGKILL", kill_all, frozenset({0, -signal.SIGKILL})),
    Ending("a worker killed", kill_a_worker, frozenset({0, 1})),
)


@pytest.fixture(scope="module")
def every_stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    inputs = Inputs(tmp_path_factory.mktemp("inputs"))
    inputs.make()
    return {stage.name: stage for stage in stages(inputs)}


@pytest.fixture(scope="module")
def quiet(
    every_stage: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, str], int]]:
    """Of each stage, what a quiet call leaves, and how many bytes that takes on a disk."""
    found = {}
    for name, stage in every_stage.items():
        out = tmp_path_factory.mktemp(f"quiet-{name}") / "out"
        code, errors = start(stage, out, stage.workers[0]).end()
        assert code == 0, errors
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        found[name] = (stage.result(out), size)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        rounds = metafunc.config.getoption("--rounds")
        every = [
            (stage.name, workers, number)
            for stage in stages(Inputs(Path()))
            for workers in stage.workers
            for number in range(rounds)
        ]
        metafunc.parametrize("case", every, ids=lambda case: "-".join(map(str, case)))


Case = tuple[str, int | None, int]


@contextmanager
def counted(stage: str, ending: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        COUNTS[stage, ending, False] += 1
        raise
    COUNTS[stage, ending, True] += 1


def assert_quiet_result(
    stage: Stage, out: Path, workers: int | None, expected: dict[str, str]
) -> None:
    """Give the same command again; what was finished needs no second call, and may refuse one."""
    code, errors = start(stage, out, workers).end()
    assert code == 0 or "--overwrite" in errors, errors
    assert "Traceback" not in errors
    assert stage.result(out) == expected
    assert [*out.parent.iterdir()] == [out], "something is left beside the output"


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name.replace(" ", "-"))
def test_an_ended_stage_continues_to_the_same_bytes(
    case: Case,
    ending: Ending,
    every_stage: dict[str, Stage],
    quiet: dict[str, tuple[dict[str, str], int]],
    tmp_path: Path,
) -> None:
    name, workers, number = case
    stage, out = every_stage[name], tmp_path / "out"
    if ending.deliver is kill_a_worker and workers is None:
        pytest.skip(f"{name} has no workers")
    chance = random.Random(f"{case} {ending.name}")
    with counted(name, ending.name):
        process = start(stage, out, workers)
        begun = time.monotonic()
        # Every third time before its work has begun, for a process may end at any moment.
        while number % 3 != 2 and process.poll() is None and not stage.begun(out):
            assert time.monotonic() < begun + SECONDS
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 1.5) * (time.monotonic() - begun) / 2)
        ending.deliver(process)
        code, errors = process.end()
        assert code in ending.codes, errors
        assert "Traceback" not in errors
        assert len(re.findall(r"^error:", errors, re.MULTILINE)) <= 1, errors
        assert_quiet_result(stage, out, workers, quiet[name][0])


def assert_one_message(stage: Stage, out: Path, workers: int | None, words: str) -> None:
    """The command fails with one message that says `words`."""
    code, errors = start(stage, out, workers).end()
    assert code == 1, errors
    assert words in errors
    assert "Traceback" not in errors
    assert len(re.findall(r"^error:", errors, re.MULTILINE)) == 1, errors


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_loses_nothing(
    case: Case,
    every_stage: dict[str, Stage],
    quiet: dict[str, tuple[dict[str, str], int]],
    tmp_path: Path,
) -> None:
    name, workers, _ = case
    expected, size = quiet[name]
    share = random.Random(f"{case}").uniform(0.05, 0.9)
    disk = tmp_path / "disk"
    with small_disk(disk, int(size * share)), counted(name, "disk full"):
        assert_one_message(every_stage[name], disk / "out", workers, "No space left on device")
        remount(disk, "size=1g")
        assert_quiet_result(every_stage[name], disk / "out", workers, expected)


def test_a_read_only_disk_is_one_message(
    case: Case,
    every_stage: dict[str, Stage],
    quiet: dict[str, tuple[dict[str, str], int]],
    tmp_path: Path,
) -> None:
    name, workers, _ = case
    disk = tmp_path / "disk"
    with small_disk(disk, 2**30), counted(name, "read-only"):
        remount(disk, "ro")
        assert_one_message(every_stage[name], disk / "out", workers, "Read-only file system")
        remount(disk, "rw")
        assert_quiet_result(every_stage[name], disk / "out", workers, quiet[name][0])
