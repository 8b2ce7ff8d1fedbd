"""Prints messages, progress and tables for people, or one JSON value for programs.

Progress is a live bar on a terminal and an occasional plain line in a log. Results go to standard
output and everything else to standard error, so that a result can be piped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LOG_EVERY_SECONDS = 15.0


class _LiveTask:
    """A rich progress bar; the rate is the mean over the whole task."""

    def __init__(self, console: Console, description: str, total: int, unit: str, done: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[status]}"),
            console=console,
            transient=True,
        )
        self._task = self.progress.add_task(
            description, total=total, completed=done, rate="", status=""
        )
        self._unit, self._new, self._start = unit, 0, time.monotonic()
        self._status = ""

    def advance(self, count: int = 1, status: str = "") -> None:
        self._new += count
        rate = self._new / max(1e-9, time.monotonic() - self._start)
        self._status = status or self._status
        self.progress.update(
            self._task,
            advance=count,
            rate=f"{rate:.3g} {self._unit}/s",
            status=self._status,
        )


class _LogTask:
    """Prints a line to a log at regular intervals and at the end."""

    def __init__(self, console: Console, description: str, total: int, unit: str, done: int):
        self._console, self._description = console, description
        self._total, self._unit, self._done, self._new = total, unit, done, 0
        self._start = self._last = time.monotonic()
        self._status = ""

    def advance(self, count: int = 1, status: str = "") -> None:
        self._done += count
        self._new += count
        self._status = status or self._status
        now = time.monotonic()
        if now - self._last >= _LOG_EVERY_SECONDS or self._done == self._total:
            self._last = now
            self._print(now)

    def _print(self, now: float) -> None:
        rate = self._new / max(1e-9, now - self._start)
        left = (self._total - self._done) / max(1e-9, rate)
        parts = [
            f"{self._description} {self._done}/{self._total} {self._unit}",
            f"{rate:.3g}/s",
            f"{_duration(left)} left" if self._done < self._total else "done",
            self._status,
        ]
        line = "  ".join(part for part in parts if part)
        self._console.print(escape(line), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class ConsoleReporter:
    """The reporter of the command line. verbosity: -1 quiet, 0 normal, 1 verbose."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self.console = Console(stderr=True, emoji=False)

    def info(self, message: str) -> None:
        if self.verbosity >= 0:
            self.console.print(escape(message), highlight=False, soft_wrap=True)

    def detail(self, message: str) -> None:
        if self.verbosity >= 1:
            self.console.print(f"[dim]{escape(message)}[/]", highlight=False, soft_wrap=True)

    def warning(self, message: str) -> None:
        self.console.print(
            f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True
        )

    @contextmanager
    def task(
        self, description: str, total: int, unit: str, done: int = 0
    ) -> Iterator[_LiveTask | _LogTask | _QuietTask]:
        if self.verbosity < 0:
            yield _QuietTask()
        elif self.console.is_terminal:
            live = _LiveTask(self.console, description, total, unit, done)
            with live.progress:
                yield live
        else:
            yield _LogTask(self.console, description, total, unit, done)


class _QuietTask:
    def advance(self, count: int = 1, status: str = "") -> None:
        pass


def print_error(message: str) -> None:
    console = Console(stderr=True, emoji=False)
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_text(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_facts(facts: Sequence[tuple[str, str]], title: str = "") -> None:
    """Print a table of two columns: names and values."""
    table = Table(show_header=False, box=None, title=title or None, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(name), escape(value))
    Console(emoji=False).print(table)
