"""When to stop before the end: signals, a limit of hours, a limit of steps.

Two ways. In a training loop (`Stop`) signals only set a flag; the loop asks after each step, all
processes agree, and the step is saved. Everywhere else (`stoppable`) a signal raises, through
whatever is being computed, and what was finished stays. Schedulers and shells send a signal twice
within a moment, which counts once; a second one seconds later, or a third, ends the process at
once and says so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Self

from dupr_cli.errors import StoppedRunError

# Of Ctrl-C, of schedulers, and of Slurm's `--signal=USR1@...` before its time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Above every signal's number, so that the largest over all processes is one reason.
_TIME_IS_UP = 1000
# A signal that comes again within this time was sent twice, not meant twice.
_REPEATED_SECONDS = 3.0
# What signal.signal takes and returns.
_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@dataclass(frozen=True)
class Limits:
    """Of one call: hours from now on, and optimiser steps. None is no limit."""

    max_hours: float | None = None
    stop_after: int | None = None


class StopSignal(BaseException):
    """A signal to stop, on its way out of whatever was being computed.

    No `Exception`: code that tries to go on after a damaged image or file must not take it for one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Patience:
    """Counts signals: the first asks to stop, and from some point on they mean at once."""

    def __init__(self) -> None:
        self._first, self._count = 0.0, 0

    def is_over(self) -> bool:
        """Take note of one signal. Whether the process has to end now."""
        now = time.monotonic()
        self._count += 1
        if self._count == 1:
            self._first = now
        return self._count > 2 or now - self._first > _REPEATED_SECONDS


def _end_now(number: int) -> NoReturn:
    name = signal.Signals(number).name
    # Written past Python's buffers: the process may be anywhere in them.
    os.write(
        sys.stderr.fileno(),
        f"error: {name} came again: ended at once. What is not saved yet is lost.\n".encode(),
    )
    os._exit(128 + number)


# The signal that `stoppable` has seen, so that it is not lost where an exception cannot pass.
_seen: list[int] = []


def raise_if_stopped() -> None:
    """Raise again what a signal raised before, where that was swallowed on its way.

    Python drops exceptions that a signal raises inside a finaliser or a callback of C code; whoever
    works in a long loop asks here after each piece.
    """
    if _seen:
        raise StopSignal(_seen[0])


def ignore_signals() -> None:
    """Called at the start of a worker process: the main process decides when it ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Let no signal raise inside, only at the end and where `raise_if_stopped` is called.

    For starting and ending processes: interrupted in the middle of that, Python's own pools wait
    for ever.
    """
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if not _deferred:
        raise_if_stopped()


@contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGUSR1 end the work inside, with one message.

    kept: what the message says of the work that was done. Raises StoppedRunError after a signal.
    Inside another `stoppable`, or outside the main thread, signals are left to those who have them.
    """
    if _seen or signal.getsignal(signal.SIGTERM) is _raise_stop:
        yield
        return
    before: dict[int, _Handler] = {}
    global _patience, _process
    _patience, _process = _Patience(), os.getpid()
    try:
        for number in _SIGNALS:
            before[number] = signal.signal(number, _raise_stop)
    except ValueError:  # not the main thread of a Python caller: signals are the caller's
        pass
    try:
        yield
        if _seen:  # it came as the work ended
            raise StopSignal(_seen[0])
    except StopSignal as error:
        message = f"stopped by {error}. {kept}"
        raise _stopped_error(error.number, message) from None
    finally:
        _seen.clear()
        for of, handler in before.items():
            signal.signal(of, handler)


_patience = _Patience()
_process = os.getpid()
_deferred = 0  # blocks of `deferred` that are open


def _raise_stop(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _process:  # a worker, forked a moment ago: the main process decides
        return
    if _patience.is_over():
        _end_now(number)
    if not _seen:
        _seen.append(number)
        if not _deferred:
            raise StopSignal(number)


class Stop:
    """Whether to stop after this step, and why.

    Where a launcher passes on what the terminal sends to all processes anyway, everything comes
    twice or more, and ending at once is the launcher's part.
    """

    def __init__(self, limits: Limits, launched: bool) -> None:
        self._limits, self._launched = limits, launched
        self._started, self._number = time.monotonic(), 0
        self._patience = _Patience()
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread of a Python caller: signals are the caller's
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._patience.is_over() and not self._launched:
            _end_now(number)
        self._number = self._number or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """0 to go on; else why to stop, as a number that processes can agree on."""
        hours = (time.monotonic() - self._started) / 3600
        limit = self._limits.max_hours
        if not self._number and limit is not None and hours >= limit:
            return _TIME_IS_UP
        return self._number

    def steps_are_done(self, steps: int) -> bool:
        """Whether `steps`, made since the call began, reach the limit."""
        return self._limits.stop_after is not None and steps >= self._limits.stop_after


def stopped(code: int, limits: Limits, what: str) -> StoppedRunError:
    """The error that ends a run. code: of `Stop.code`, 0 for the limit of steps."""
    if code == _TIME_IS_UP:
        why = f"stopped after --max-hours {limits.max_hours:g}"
    elif code:
        why = f"stopped by {signal.Signals(code).name}"
    else:
        why = f"stopped by --stop-after {limits.stop_after}"
    message = f"{why}; {what}. The same command continues from there."
    return _stopped_error(code, message)


def _stopped_error(number: int, message: str) -> StoppedRunError:
    if number == signal.SIGINT:
        return StoppedRunError(message, 128 + signal.SIGINT)
    return StoppedRunError(message)
