"""The interface through which a stage reports its progress.

Stages take a `Reporter` and call it. The command line passes one that draws a live display on a
terminal and writes plain lines to a log (`dupr_cli.cli.console`). A Python caller may omit it, or
pass a `LoggingReporter`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from dupr_cli.addresses import without_secrets
from dupr_cli.outside_text import one_line
from dupr_cli.pace import Pace, duration


class Task(Protocol):
    """Long work whose progress is counted."""

    def advance(self, count: int = 1, status: str = "") -> None:
        """`count` more units are done. status: a short text shown beside them; its parts are two
        spaces apart, the most important first, as a narrow terminal leaves out the last ones."""
        ...


class Reporter(Protocol):
    """Receives the messages of a stage while it works."""

    def info(self, message: str) -> None:
        """A message for everyone."""
        ...

    def detail(self, message: str) -> None:
        """A message only for users who asked for more detail."""
        ...

    def warning(self, message: str) -> None:
        """A problem that the user should act on, although the work continues."""
        ...

    def task(
        self, description: str, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Task]:
        """Begin long work of `total` units (images, steps), of which `done` are already done."""
        ...


class _SilentTask:
    def advance(self, count: int = 1, status: str = "") -> None:
        pass


class SilentReporter:
    """The default reporter of Python calls, which prints nothing."""

    def info(self, message: str) -> None:
        pass

    def detail(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield _SilentTask()


class _LoggedTask:
    def __init__(
        self, reporter: LoggingReporter, description: str, total: int, unit: str, done: int
    ) -> None:
        self._reporter, self._name, self._total, self._unit = reporter, description, total, unit
        self._done, self._last = done, reporter.clock()
        self._pace = Pace(reporter.clock)

    def advance(self, count: int = 1, status: str = "") -> None:
        self._done += count
        self._pace.advance(count)
        now, ended = self._reporter.clock(), self._done >= self._total
        if not ended and now - self._last < self._reporter.seconds:
            return
        self._last = now
        parts = [f"{self._name} {self._done}/{self._total} {self._unit}"]
        if ended:
            parts.append("done")
        elif rate := self._pace.rate:
            parts += [f"{rate:.3g}/s", f"{duration((self._total - self._done) / rate)} left"]
        self._reporter.info("  ".join([*parts, *([status] if status else [])]))


class LoggingReporter:
    """Writes messages and progress to a logger: messages as INFO, details as DEBUG, warnings as
    WARNING, and a line about long work every so many seconds."""

    def __init__(
        self,
        logger: logging.Logger | None = None,
        seconds: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """logger: `dupr` by default. seconds: between lines of the same work. clock: seconds."""
        self._logger = logger or logging.getLogger("dupr")
        self.seconds, self.clock = seconds, clock

    def info(self, message: str) -> None:
        self._logger.info("%s", _shown(message))

    def detail(self, message: str) -> None:
        self._logger.debug("%s", _shown(message))

    def warning(self, message: str) -> None:
        self._logger.warning("%s", _shown(message))

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield _LoggedTask(self, description, total, unit, done)


def _shown(message: str) -> str:
    return one_line(without_secrets(message))
