"""Loads batches in worker processes; the batches do not depend on the number of workers.

What a worker reads depends only on the request. Workers return errors as values, because an
exception raised in a worker would reach the user with the worker's traceback in its message. Only
the main process handles signals to the process group; it needs its workers to finish a step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dupr_cli.errors import DuprError, RunError
from dupr_cli.runtime.machine import require_room
from dupr_cli.runtime.stopping import deferred

Request = TypeVar("Request")
Item = TypeVar("Item")
Batch = TypeVar("Batch")

LOADER_BYTES = 250 * 2**20  # that a worker takes, seen with ResNet-18's recipe

# Longer than a step and a checkpoint take; a worker then ends by SIGALRM.
_GRACE_SECONDS = 60


class _Reading(Dataset[Item | DuprError], Generic[Request, Item]):
    """A data set whose items are the results of the sampler's requests."""

    def __init__(self, read: Callable[[Request], Item]) -> None:
        self._read = read

    def __getitem__(self, request: Request) -> Item | DuprError:
        try:
            return self._read(request)
        except DuprError as error:
            return error
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            return RunError(f"{name}cannot be read: {error.strerror or error}.")


@dataclass(frozen=True)
class _Collating(Generic[Item, Batch]):
    collate: Callable[[list[Item]], Batch]

    def __call__(self, items: list[Item | DuprError]) -> Batch | DuprError:
        read: list[Item] = []
        for item in items:
            if isinstance(item, DuprError):
                return item
            read.append(item)
        return self.collate(read)


def _outlive_signals(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Python also ends leftover workers by SIGTERM, so it may only be postponed.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


@contextmanager
def _keeping_child_signal() -> Iterator[None]:
    """Keep torch from raising an error wherever this process happens to be when a worker dies.

    torch installs a handler of SIGCHLD for that. The error would leave a training step at any line,
    or be printed with a traceback and forgotten in a destructor. Without the handler, the death is
    seen when the worker's next batch is awaited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def load(
    read: Callable[[Request], Item],
    collate: Callable[[list[Item]], Batch],
    requests: Iterable[Sequence[Request]],
    workers: int,
    device: torch.device | None = None,
    *,
    prefetch: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield one batch for each of `requests`, in order; close the generator to end its workers.

    read: reads one item; must be picklable if workers are not forked. requests: one list of
    requests per batch; may be infinite. workers: number of processes, 0 for none. device: of the
    batches; for a GPU their memory is pinned. prefetch: number of batches that each worker keeps
    ready.
    Raises the DuprError of the first item that could not be read, RunError when a worker dies, and
    UsageError when there is no memory for so many workers.
    """
    require_room(workers, LOADER_BYTES, "--workers")
    loader: DataLoader[Batch | DuprError] = DataLoader(
        cast(Dataset[Batch | DuprError], _Reading(read)),
        batch_sampler=cast(Sampler[list[int]], requests),  # passed on by the loader unchanged
        num_workers=workers,
        collate_fn=_Collating(collate),
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_outlive_signals,
        prefetch_factor=prefetch if workers else None,
    )
    with deferred(), _keeping_child_signal():
        batches = iter(loader)  # starts the workers
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # The last two: a worker died between announcing a batch and handing it over.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise RunError(
                    "a process that loads images was killed, most likely because memory ran out. "
                    "Give the same command again with fewer --workers."
                ) from None
            if isinstance(batch, DuprError):
                raise batch
            yield batch
    finally:
        with deferred():
            del batches  # ends the workers


def in_batches(count: int, size: int) -> list[list[int]]:
    """The numbers from 0 to count - 1 in lists of `size`."""
    return [list(range(first, min(count, first + size))) for first in range(0, count, size)]
