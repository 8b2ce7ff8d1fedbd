"""When to stop before the end: signals, a limit of hours, a limit of steps.

Signals only set a flag; the loop asks after each step, all processes agree, and the step is saved.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from dupr_cli.errors import StoppedRunError

# Of Ctrl-C, of schedulers, and of Slurm's `--signal=USR1@...` before its time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Above every signal's number, so that the largest over all processes is one reason.
_TIME_IS_UP = 1000
# What signal.signal takes and returns.
_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@dataclass(frozen=True)
class Limits:
    """Of one call: hours from now on, and optimiser steps. None is no limit."""

    max_hours: float | None = None
    stop_after: int | None = None


class Stop:
    """Whether to stop after this step, and why.

    A second signal of the same kind acts at once, as without this; but not where a launcher passes
    on what the terminal sends to all processes anyway, and everything comes twice.
    """

    def __init__(self, limits: Limits, launched: bool) -> None:
        self._limits, self._launched = limits, launched
        self._started, self._number = time.monotonic(), 0
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread of a Python caller: signals are the caller's
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = number
        if not self._launched:
            signal.signal(number, self._before[number])

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
    if code == signal.SIGINT:
        return StoppedRunError(message, 128 + signal.SIGINT)
    return StoppedRunError(message)
