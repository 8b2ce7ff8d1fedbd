"""A reporter that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dupr_cli.progress import SilentReporter, Task


class Listening(SilentReporter):
    """Keeps what is said: the warnings, and all of it with the names of tasks."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)

    def warning(self, message: str) -> None:
        self.said.append(message)
        self.warnings.append(message)

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        self.said.append(description)
        with super().task(description, total, unit, done) as task:
            yield task
