"""Loading with workers: errors as values, workers that are killed, the same for any number."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from dupr_cli.errors import RunError, UsageError
from dupr_cli.runtime.loader import in_batches, load
from tests.support.images import encode, noise_image
from tests.support.workspace import Workspace


@dataclass(frozen=True)
class Squares:
    """Reads the square of a number; some numbers fail in their own way."""

    damaged: int = -1
    missing: int = -1
    deadly: int = -1

    def __call__(self, number: int) -> int:
        if number == self.damaged:
            raise RunError(f"image {number} is damaged")
        if number == self.missing:
            Path(f"/nowhere/{number}").read_bytes()
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2


def test_any_number_of_workers_gives_the_same_batches() -> None:
    wanted = [[n**2 for n in batch] for batch in in_batches(10, 3)]
    for workers in (0, 1, 3):
        assert list(load(Squares(), list, in_batches(10, 3), workers)) == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_reading_comes_out_in_its_own_words(workers: int) -> None:
    with closing(load(Squares(damaged=7), list, in_batches(10, 3), workers)) as batches:
        assert next(batches) == [0, 1, 4]
        assert next(batches) == [9, 16, 25]
        with pytest.raises(RunError, match=r"^image 7 is damaged$"):
            next(batches)
    with pytest.raises(
        RunError, match=r"^/nowhere/3: cannot be read: No such file or directory\.$"
    ):
        list(load(Squares(missing=3), list, in_batches(10, 3), workers))


def test_more_workers_than_memory_are_refused_before_they_start() -> None:
    message = r"--workers: 100000 worker processes would need about \d+ GiB of memory"
    with pytest.raises(UsageError, match=message):
        next(load(Squares(), list, in_batches(10, 3), 100_000))


def test_a_worker_that_is_killed_is_told_of() -> None:
    with pytest.raises(RunError, match="killed, most likely because memory ran out"):
        list(load(Squares(deadly=5), list, in_batches(10, 3), 2))


def test_closing_ends_the_workers() -> None:
    batches = load(os_getpid, list, ([n] for n in range(10**9)), 2)
    processes = {next(batches)[0] for _ in range(8)}
    batches.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def os_getpid(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_evaluate_with_one_message(tmp_path: Path, workers: int) -> None:
    """The fault behind this file: with workers it ended in a traceback."""
    space = Workspace(tmp_path / "space", images=0)
    path = next((space.tree / "JPEGImages").glob("*.png"))
    # Of a JPEG only decoding shows that its end is missing.
    path.write_bytes(encode(noise_image(0, 96, 72))[:-400])
    done = space.evaluate("--set", f"train.workers={workers}", "--set", "train.iterations=4")
    assert done.code == 1
    assert str(path) in done.output.replace("\n", "")
    assert done.output.count("error:") == 1


def test_an_error_keeps_its_kind_and_so_its_exit_code() -> None:
    with pytest.raises(UsageError, match=r"^wrong$"):
        list(load(raising, list, [[0]], 2))


def raising(_: int) -> int:
    raise UsageError("wrong")


def test_the_death_of_a_worker_reaches_only_who_waits_for_a_batch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The fault behind this test: torch raised in the middle of a training step."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader of another test may have set torch's
    batches = load(os_getpid, list, ([n] for n in range(10**9)), 2)
    os.kill(next(batches)[0], signal.SIGKILL)
    for _ in range(50):  # a step
        time.sleep(0.01)
    with pytest.raises(RunError, match=r"^a process that loads images was killed"):
        list(islice(batches, 1000))
    batches.close()
    assert "Traceback" not in capfd.readouterr().err
