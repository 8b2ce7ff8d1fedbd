"""The interface through which a stage reports its progress.

Stages take a `Reporter` and call it. The command line passes one that draws a live display on a
terminal and writes plain lines to a log (`dupr_cli.cli.console`). A Python caller may omit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


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
