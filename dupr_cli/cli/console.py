"""Prints messages, progress and tables for people, or one JSON value for programs.

Progress is a live bar on a terminal and in a notebook, and an occasional plain line in a log.
Results go to standard output and everything else to standard error, so that a result can be piped.
All of it passes through `outside_text`, since names in it come from outside, and through
`without_secrets`.
"""

from __future__ import annotations

import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dupr_cli.addresses import without_secrets
from dupr_cli.outside_text import json_text, message_text, one_line, several_lines
from dupr_cli.pace import Pace, duration, fitted
from dupr_cli.progress import Task

Clock = Callable[[], float]

_LOG_EVERY_SECONDS = 15.0
_NOTEBOOK_EVERY_SECONDS = 0.5
_BAR_WIDTH = 20


def _line(text: str) -> str:
    return one_line(without_secrets(text))


def _wrapped(text: str, width: int, indent: str = "") -> str:
    """Lines between words of a paragraph; longer words, such as paths, stay whole."""
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _print_message(console: Console, message: str, label: str = "", style: str = "") -> None:
    """Print a message after a label.

    A terminal wraps it between words and leaves longer words, such as paths, whole; a log keeps its
    lines.
    """
    shown = message_text(without_secrets(f"{label} {message}" if label else message))
    if console.is_terminal:
        shown = "\n".join(_wrapped(line, console.width) for line in shown.split("\n"))
    text = Text(shown)
    text.stylize(style, 0, len(label) or None)
    console.print(text, soft_wrap=True)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return escape(_line(text))


class _Progress:
    """The state of counted work and the texts that describe it.

    A status has parts, two spaces apart, the most important one first.
    """

    def __init__(self, description: str, total: int, unit: str, done: int, clock: Clock):
        self.description, self.total, self.unit, self.done = _line(description), total, unit, done
        self._pace, self._status = Pace(clock), ""

    def advance(self, count: int, status: str) -> None:
        self.done += count
        self._pace.advance(count)
        self._status = _line(status) or self._status

    @property
    def counted(self) -> str:
        return f"{self.description} {self.done}/{self.total} {self.unit}"

    @property
    def left(self) -> str:
        if self.done >= self.total:
            return "done"
        rate = self._pace.rate
        return f"{duration((self.total - self.done) / rate)} left" if rate else ""

    @property
    def rate(self) -> str:
        return f"{rate:.3g}/s" if (rate := self._pace.rate) else ""

    @property
    def status(self) -> list[str]:
        return [part for part in self._status.split("  ") if part]

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0

    def line(self, width: int) -> list[tuple[str, str]]:
        """Texts of one line with their styles: of what does not fit, the details go first."""
        filled = round(_BAR_WIDTH * self.share)
        bar = "━" * filled + " " * (_BAR_WIDTH - filled)
        first, *details = self.status or [""]
        parts = [
            (0, self.counted, "bold"),
            (3, bar, "green"),
            (0, self.left, "cyan"),
            (0, first, ""),
            (1, self.rate, ""),
            *((2, detail, "dim") for detail in details),
        ]
        parts = [part for part in parts if part[1]]
        shown = fitted([(rank, text) for rank, text, _ in parts], width)
        return [parts[place][1:] for place in shown]


class _LiveTask:
    """One live line on a terminal."""

    def __init__(self, console: Console, progress: _Progress):
        from rich.live import Live

        self._progress = progress
        self.live = Live(self, console=console, transient=True)

    def advance(self, count: int = 1, status: str = "") -> None:
        self._progress.advance(count, status)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = Text("  ").join(Text(*part) for part in self._progress.line(options.max_width))
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line


class _NotebookTask:
    """One line below the cell of a notebook, which is written again in place.

    Rich's live displays need ipywidgets there; a carriage return needs nothing.
    """

    def __init__(self, progress: _Progress, width: int, clock: Clock):
        self._progress, self._width, self._clock = progress, width, clock
        self._last, self._length = float("-inf"), 0

    def advance(self, count: int = 1, status: str = "") -> None:
        progress = self._progress
        progress.advance(count, status)
        now = self._clock()
        if now - self._last >= _NOTEBOOK_EVERY_SECONDS or progress.done == progress.total:
            self._last = now
            line = "  ".join(text for text, _ in progress.line(self._width))
            sys.stdout.write("\r" + line.ljust(self._length))
            self._length = len(line)


class _LogTask:
    """Prints a line to a log at regular intervals and at the end."""

    def __init__(self, console: Console, progress: _Progress, clock: Clock):
        self._console, self._progress, self._clock = console, progress, clock
        self._last = clock()

    def advance(self, count: int = 1, status: str = "") -> None:
        progress = self._progress
        progress.advance(count, status)
        now = self._clock()
        if now - self._last >= _LOG_EVERY_SECONDS or progress.done == progress.total:
            self._last = now
            parts = [progress.counted, progress.rate, progress.left, *progress.status]
            line = "  ".join(part for part in parts if part)
            self._console.print(escape(line), highlight=False, soft_wrap=True)


class ConsoleReporter:
    """The reporter of the command line. verbosity: -1 quiet, 0 normal, 1 verbose."""

    def __init__(
        self,
        verbosity: int = 0,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.verbosity = verbosity
        self.console = console or Console(stderr=True, emoji=False)
        self._clock = clock

    def info(self, message: str) -> None:
        if self.verbosity >= 0:
            _print_message(self.console, message)

    def detail(self, message: str) -> None:
        if self.verbosity >= 1:
            _print_message(self.console, message, style="dim")

    def warning(self, message: str) -> None:
        _print_message(self.console, message, "warning:", "yellow")

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        progress = _Progress(description, total, unit, done, self._clock)
        if self.verbosity < 0:
            yield _QuietTask()
        elif self.console.is_jupyter:
            yield _NotebookTask(progress, self.console.width, self._clock)
            sys.stdout.write("\n")
        elif self.console.is_terminal:
            task = _LiveTask(self.console, progress)
            with task.live:
                yield task
        else:
            yield _LogTask(self.console, progress, self._clock)


class _QuietTask:
    def advance(self, count: int = 1, status: str = "") -> None:
        pass


@contextmanager
def passing_line(text: str) -> Iterator[None]:
    """Show a line on a terminal for as long as the block takes; nothing in a log."""
    console = Console(stderr=True, emoji=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    # Without rich's live display, which hides the cursor: the process may be killed meanwhile.
    sys.stderr.write(text)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def print_error(message: str) -> None:
    _print_message(Console(stderr=True, emoji=False), message, "error:", "bold red")


def print_following(command: str) -> None:
    """Say what people do next; the command stays on one line, to be copied."""
    shown = message_text(without_secrets(f"Next: {command}"))
    Console(stderr=True, emoji=False).print(Text(shown), soft_wrap=True)


def print_json(value: object) -> None:
    sys.stdout.write(without_secrets(json_text(value, indent=1)) + "\n")


def print_sentences(text: str, indent: str = "") -> None:
    """Print sentences of a result, in which names from outside are `one_line` already.

    A terminal wraps them between words, and indents what follows the first line.
    """
    console = Console(emoji=False)
    if console.is_terminal:
        text = _wrapped(without_secrets(text), console.width, indent)
    print_text(text)


def print_text(text: str) -> None:
    """Print lines of a result, in which names from outside are `one_line` already."""
    shown = several_lines(without_secrets(text))
    sys.stdout.write(shown if shown.endswith("\n") else shown + "\n")


def print_markdown(text: str) -> None:
    """Print a Markdown result: laid out for people on a terminal, as it is otherwise."""
    console = Console(emoji=False)
    if console.is_terminal:
        from rich.markdown import Markdown

        # A terminal has no pictures.
        lines = [line for line in text.split("\n") if not line.startswith("![")]
        shown = several_lines(without_secrets("\n".join(lines)))
        console.print(Markdown(shown, hyperlinks=False))
    else:
        print_text(text)


def print_traceback(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(message_text(without_secrets(text)))


def print_facts(facts: Sequence[tuple[str, str]], title: str = "") -> None:
    """Print a table of two columns: names and values."""
    table = Table(show_header=False, box=None, title=title or None, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(cell(name), cell(value))
    Console(emoji=False).print(table)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> None:
    """Print a table. numbers: this many columns from the left are right-aligned."""
    table = Table(box=None, header_style="dim")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place < numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    Console(emoji=False).print(table)
