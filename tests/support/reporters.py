"""A reporter that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dupr_cli.progress import SilentReporter, Task


class Listening(SilentReporter):
    """said: infos, warnings and names of tasks, in their order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, message: str) -> None:
        self.said.append(message)

    def warning(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        self.said.append(description)
        with super().task(description, total, unit, done) as task:
            yield task
