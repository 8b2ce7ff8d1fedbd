"""A trace of a few training steps and their top costs, for `--profile`.

Training loops call `step_done` after each step; only inside `profiling` does it do anything. The
first steps are left out: they start loaders and choose kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dupr_cli.artifacts.files import write_text
from dupr_cli.progress import Reporter

TRACE_FILE, COSTS_FILE = "trace.json.gz", "costs.txt"
# Skipped, warmed up, and recorded steps.
_WAIT, _WARM_UP, _ACTIVE = 3, 1, 3
_ROWS = 40

_profiler: ContextVar[profile | None] = ContextVar("_profiler", default=None)


def step_done() -> None:
    """Tell the profiler, if there is one, that a step of training has ended."""
    current = _profiler.get()
    if current is not None:
        current.step()


@contextmanager
def profiling(folder: Path | None, reporter: Reporter) -> Iterator[None]:
    """Record some of the steps made inside, and write them to `folder`; None records nothing.

    Of several processes, the first records. The trace opens in Perfetto or chrome://tracing. Files
    of an earlier profile are replaced.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    written = False

    def write(recorded: profile) -> None:
        nonlocal written
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / TRACE_FILE))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(by, row_limit=_ROWS)
        write_text(folder / COSTS_FILE, f"{_ACTIVE} steps\n{table}\n")
        written = True
        reporter.info(
            f"profile: {_ACTIVE} steps are in {folder / TRACE_FILE}, and their top costs in "
            f"{folder / COSTS_FILE}"
        )

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=_WAIT, warmup=_WARM_UP, active=_ACTIVE, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as recorder:
        token = _profiler.set(recorder)
        try:
            yield
        finally:
            _profiler.reset(token)
    if not written:
        reporter.warning(
            f"--profile: nothing is written, because fewer than {_WAIT + _WARM_UP + _ACTIVE} steps "
            f"were made."
        )
