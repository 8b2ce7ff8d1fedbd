"""How a stage tells what it is doing, without knowing who listens.

Stages take a `Reporter` and call it; the command line passes one that draws a live display on a
terminal and plain lines in a log (`dupr_cli.cli.console`), a Python caller may leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A piece of long work whose progress is counted."""

    def advance(self, count: int = 1, status: str = "") -> None:
        """`count` more units are done; `status` is a short text shown beside the bar."""
        ...


class Reporter(Protocol):
    """What a stage may say while it works."""

    def info(self, message: str) -> None:
        """A fact worth a line."""
        ...

    def detail(self, message: str) -> None:
        """A fact worth a line only to those who asked for more."""
        ...

    def warning(self, message: str) -> None:
        """Something that the user should act on, although the work goes on."""
        ...

    def task(
        self, description: str, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Task]:
        """Long work of `total` units (images, steps), of which `done` were done before."""
        ...


class _SilentTask:
    def advance(self, count: int = 1, status: str = "") -> None:
        pass


class SilentReporter:
    """The reporter of a Python caller who passed none: says nothing."""

    def info(self, message: str) -> None:
        pass

    def detail(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield _SilentTask()
