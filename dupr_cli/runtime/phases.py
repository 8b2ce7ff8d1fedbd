"""Names the phases of a step, for traces and for measurements.

Code marks a phase with `with phase("name")`. In a trace of torch's profiler, the name stands over
the operations of the phase; inside `PhaseTimes`, its time is added up. Otherwise a mark costs
about a microsecond.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

import torch
from torch.autograd.profiler import record_function

_times: ContextVar[PhaseTimes | None] = ContextVar("_times", default=None)


class PhaseTimes:
    """Adds up the seconds of each phase that is entered while it is active.

    A phase within another counts for itself only, so that the sum is the time in phases. On a GPU,
    the device is awaited at both ends of a phase: its seconds are those of its operations, but
    phases do not overlap as they would without a measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._inner: list[float] = []  # seconds of the phases within each open one

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def open(self) -> float:
        self._inner.append(0.0)
        return self.now()

    def close(self, name: str, start: float) -> None:
        elapsed = self.now() - start
        self.seconds[name] += elapsed - self._inner.pop()
        if self._inner:
            self._inner[-1] += elapsed

    def __enter__(self) -> Self:
        self._token: Token[PhaseTimes | None] = _times.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _times.reset(self._token)


def phase(name: str) -> _Phase:
    """A context manager that names what is done inside it."""
    return _Phase(name)


class _Phase(record_function):
    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._listener = _times.get()
        if self._listener is not None:
            self._start = self._listener.open()
        return self

    def __exit__(self, *error: object) -> None:
        if self._listener is not None:
            self._listener.close(self.name, self._start)
        super().__exit__(*error)
