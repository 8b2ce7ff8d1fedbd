"""Counts of `test_endings`, printed as the table of docs/reliability.md."""

from __future__ import annotations

from collections import Counter

import pytest

COUNTS: Counter[tuple[str, str, bool]] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=1, help="How often each ending is tried.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    endings = list(dict.fromkeys(ending for _, ending, _ in COUNTS))
    if not endings:
        return
    terminalreporter.write_line("| stage | " + " | ".join(endings) + " |")
    terminalreporter.write_line("|---|" + "---|" * len(endings))
    for stage in dict.fromkeys(stage for stage, _, _ in COUNTS):
        cells = []
        for ending in endings:
            good, bad = COUNTS[stage, ending, True], COUNTS[stage, ending, False]
            cells.append(f"{good} of {good + bad}" if good + bad else "")
        terminalreporter.write_line(f"| {stage} | " + " | ".join(cells) + " |")
