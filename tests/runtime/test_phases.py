"""Phases of a step: their times, and their names in a trace."""

import time

import pytest
import torch
from torch.profiler import profile

from dupr_cli.runtime.phases import PhaseTimes, phase

CPU = torch.device("cpu")


def test_a_phase_within_another_counts_only_for_itself() -> None:
    start = time.perf_counter()
    with PhaseTimes(CPU) as times, phase("outer"):
        time.sleep(0.01)
        with phase("inner"):
            time.sleep(0.03)
    whole = time.perf_counter() - start
    assert times.seconds["inner"] >= 0.03
    assert 0.01 <= times.seconds["outer"] <= whole - times.seconds["inner"]


def test_nothing_is_added_up_outside() -> None:
    times = PhaseTimes(CPU)
    with phase("before"):
        pass
    with times, phase("inside"):
        pass
    with phase("after"):
        pass
    assert list(times.seconds) == ["inside"]


def test_a_phase_that_fails_is_closed() -> None:
    with PhaseTimes(CPU) as times:
        with pytest.raises(ZeroDivisionError), phase("outer"), phase("inner"):
            raise ZeroDivisionError
        with phase("next"):
            pass
    assert list(times.seconds) == ["inner", "outer", "next"]


def test_a_trace_shows_the_names() -> None:
    with profile() as trace, phase("a part of a step"):
        torch.zeros(2) + 1
    assert "a part of a step" in {event.key for event in trace.key_averages()}
