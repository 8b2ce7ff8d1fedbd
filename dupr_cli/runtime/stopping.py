"""Stops work before its end: by a signal, a limit of hours, or a limit of steps.

In a training loop (`Stop`), signals only set a flag; the loop checks it after each step, all
processes agree, and the step is saved. Everywhere else (`stoppable`), a signal raises through the
current computation, and finished work is kept. Schedulers and shells often send a signal twice in
quick succession, which counts once. A second signal seconds later, or a third, ends the process
immediately with a message.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn, Self

from dupr_cli.errors import StoppedRunError

# Sent by Ctrl-C, by schedulers, and by Slurm's `--signal=USR1@...` before its time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Larger than any signal's number, so that the maximum over all processes is a single reason.
_TIME_IS_UP = 1000
# A signal repeated within this time counts as the same request.
_REPEATED_SECONDS = 3.0
# The type that signal.signal takes and returns.
_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@dataclass(frozen=True)
class Limits:
    """Limits of one call: hours from its start, and optimiser steps. None means no limit.

    began: when the call started, by time.monotonic. All trainings of a call share it.
    """

    max_hours: float | None = None
    stop_after: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def time_is_up(self) -> bool:
        hours = (time.monotonic() - self.began) / 3600
        return self.max_hours is not None and hours >= self.max_hours

    def require_time(self, what: str) -> None:
        """Raises StoppedRunError when the time is up. what: is kept, for the message."""
        if self.time_is_up:
            raise stopped(_TIME_IS_UP, self, what)


class StopSignal(BaseException):
    """Raised by a signal to stop, through the current computation.

    This is not an `Exception`: code that continues after a damaged image or file must not catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Patience:
    """Counts signals: the first one requests a stop, later ones may demand an immediate end."""

    def __init__(self) -> None:
        self._first, self._count = 0.0, 0

    def is_over(self) -> bool:
        """Count one signal, and return whether the process must end now."""
        now = time.monotonic()
        self._count += 1
        if self._count == 1:
            self._first = now
        return self._count > 2 or now - self._first > _REPEATED_SECONDS


def _end_now(number: int) -> NoReturn:
    name = signal.Signals(number).name
    _say(f"error: {name} came again: ended at once. Unsaved work is lost.")
    os._exit(128 + number)


def _say(message: str) -> None:
    """Write a line to standard error past Python's buffers, which the interrupted code may be
    using. On a terminal it takes the place of the live line, which is drawn again below it."""
    erased = "\r\x1b[K" if os.isatty(2) else ""
    os.write(2, f"{erased}{message}\n".encode())


# The signal that `stoppable` has received, kept in case its exception is swallowed.
_seen: list[int] = []


def raise_if_stopped() -> None:
    """Raise StopSignal again if a signal arrived but its exception was swallowed.

    Python drops exceptions that a signal raises inside a finaliser or a callback of C code, so long
    loops call this after each piece of work.
    """
    if _seen:
        raise StopSignal(_seen[0])


def ignore_signals() -> None:
    """Ignore signals in a worker process; the main process decides when the worker ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Postpone the exception of a signal to the end of the block or to `raise_if_stopped`.

    This protects starting and ending processes: if interrupted there, Python's pools wait for ever.
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
def stoppable(advice: str) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGUSR1 end the work inside, with one message.

    advice: the part of the message on finished work. Raises StoppedRunError after a signal. Inside
    another `stoppable`, or outside the main thread, the existing signal handlers stay.
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
    except ValueError:  # not in the main thread; the Python caller handles signals
        pass
    try:
        yield
        if _seen:  # the signal arrived as the work ended
            raise StopSignal(_seen[0])
    except StopSignal as error:
        message = f"stopped by {error}. {advice}"
        raise _stopped_error(error.number, message) from None
    finally:
        _seen.clear()
        for handled, handler in before.items():
            signal.signal(handled, handler)


_patience = _Patience()
_process = os.getpid()
_deferred = 0  # number of open `deferred` blocks


def _raise_stop(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _process:  # a worker that was just forked; the main process decides
        return
    if _patience.is_over():
        _end_now(number)
    if not _seen:
        _seen.append(number)
        if not _deferred:
            raise StopSignal(number)


class Stop:
    """Decides whether to stop after this step, and why.

    A launcher passes on signals that the terminal also sends to all processes, so that each arrives
    at least twice. In a launched process only the launcher ends the work immediately.
    """

    def __init__(self, limits: Limits, launched: bool) -> None:
        self._limits, self._launched = limits, launched
        self._number = 0
        self._patience = _Patience()
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not in the main thread; the Python caller handles signals
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._patience.is_over() and not self._launched:
            _end_now(number)
        if not self._number and os.environ.get("RANK", "0") == "0":
            _say(f"{signal.Signals(number).name}: finishing this step, then saving it")
        self._number = self._number or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """0 to continue, otherwise the reason to stop, as a number that processes can agree on."""
        # A signal from before the loop, whose exception was swallowed, still asks to stop.
        number = self._number or (_seen[0] if _seen else 0)
        if not number and self._limits.time_is_up:
            return _TIME_IS_UP
        return number

    def steps_are_done(self, steps: int) -> bool:
        """Whether `steps`, counted from the start of the call, reach the limit."""
        return self._limits.stop_after is not None and steps >= self._limits.stop_after


def stopped(code: int, limits: Limits, what: str) -> StoppedRunError:
    """The error that ends a run. code: from `Stop.code`, 0 for the limit of steps."""
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
