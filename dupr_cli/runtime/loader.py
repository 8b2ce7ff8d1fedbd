"""Loading with worker processes: requests in, batches out, the same for any number of workers.

What a worker reads depends on the request alone. Errors come back as values: an exception raised in
a worker would reach the user with the worker's traceback in its message. Signals to the process
group are the main process's to handle, which still needs its workers to finish a step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dupr_cli.errors import DuprError, RunError
from dupr_cli.runtime.stopping import deferred

Request = TypeVar("Request")
Item = TypeVar("Item")
Batch = TypeVar("Batch")

# Longer than a step and a checkpoint take; after it a worker ends by SIGALRM.
_GRACE_SECONDS = 60


class _Reading(Dataset[Item | DuprError], Generic[Request, Item]):
    """A data set of whatever the sampler asks for."""

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
    # SIGTERM is also how Python ends workers that are left over, so it may only be put off.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def load(
    read: Callable[[Request], Item],
    collate: Callable[[list[Item]], Batch],
    requests: Iterable[Sequence[Request]],
    workers: int,
    device: torch.device | None = None,
    *,
    prefetch: int | None = None,
) -> Generator[Batch, None, None]:
    """Batches, one for each of `requests`, in order; close it to end its workers.

    read: one item; must pickle where workers are started afresh. requests: lists of requests, one
    list a batch, without end where it likes. workers: processes, 0 for none. device: where batches
    go; for a GPU their memory is pinned. prefetch: batches that each worker holds ready.
    Raises the DuprError of the first item that could not be read, RunError when a worker is gone.
    """
    loader: DataLoader[Batch | DuprError] = DataLoader(
        cast(Dataset[Batch | DuprError], _Reading(read)),
        batch_sampler=cast(Sampler[list[int]], requests),  # the loader passes on what it yields
        num_workers=workers,
        collate_fn=_Collating(collate),
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_outlive_signals,
        prefetch_factor=prefetch if workers else None,
    )
    with deferred():
        batches = iter(loader)  # starts its workers
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise RunError(
                    "a process that loads images was killed, most often because memory ran out. "
                    "Use fewer --workers, and give the same command again."
                ) from None
            if isinstance(batch, DuprError):
                raise batch
            yield batch
    finally:
        with deferred():
            del batches  # its workers end with it


def in_batches(count: int, size: int) -> list[list[int]]:
    """0 to count - 1, `size` at a time."""
    return [list(range(first, min(count, first + size))) for first in range(0, count, size)]
