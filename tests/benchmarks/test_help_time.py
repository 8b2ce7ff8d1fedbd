"""How long `dupr --help` takes beyond starting Python.

`make bench` prints the times; docs/benchmarks.md says what was seen. No test asserts one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def test_help_against_an_empty_program() -> None:
    pairs = [(seconds(["-m", "dupr_cli", "--help"]), seconds(["-c", "pass"])) for _ in range(11)]
    shown, empty = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    print(f"\ndupr --help {shown:.3f} s, python -c pass {empty:.3f} s: {shown - empty:.3f} s more")
    assert shown > 0
