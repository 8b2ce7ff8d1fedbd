"""The processes of a run: one, or many that torch.distributed ties together.

Each process takes an equal part of the global batch, in rank order. Everything here is the identity
or a plain indexing for a single process, so that the trainer is written once. Small tensors on the
CPU travel by gloo, those on a GPU by NCCL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dupr_cli.errors import RunError, UsageError
from dupr_cli.runtime.devices import choose_device

# Longer than a probe or the writing of a checkpoint, during which the others wait for rank 0.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """This process among those of the run. device: where it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest over all processes, entry by entry."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes (size * N, ...), in rank order."""
        if self.size == 1:
            return values
        gathered = values.new_empty(self.size * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(gathered, values.contiguous())
        return gathered

    def exchange(self, values: Tensor, order: Tensor) -> Tensor:
        """This process's part of the global batch in another order.

        values: (N, ...), this process's rows. order: (size * N,), on the CPU and the same in all
        processes: row i of the result on rank r is global row order[r * N + i].
        """
        if self.size == 1:
            return values[order.to(values.device)]
        rows = len(values)
        parts = order.view(self.size, rows)
        mine, wanted = parts // rows == self.rank, parts[self.rank]
        sent = values[(parts[mine] % rows).to(values.device)]
        if values.dtype == torch.bool:
            sent = sent.byte()
        received = torch.empty_like(sent)
        owners = wanted // rows
        dist.all_to_all_single(
            received,
            sent.contiguous(),
            torch.bincount(owners, minlength=self.size).tolist(),
            mine.sum(1).tolist(),
        )
        # Rows came by owner; each owner kept their order.
        places = owners.argsort(stable=True).to(values.device)
        result = torch.empty_like(received)
        result[places] = received
        return result.to(values.dtype)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def require_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises RunError when a tensor differs between processes in any bit.

        They start equal and see the same; a difference means a broken machine or library.
        """
        if self.size == 1:
            return
        names = sorted(tensors)
        own = torch.stack([_digest(tensors[name]) for name in names])
        of_all = self.gather(own[None])  # (size, tensors, 32)
        differing = (of_all != of_all[0]).any(2).any(0).nonzero().flatten().tolist()
        if differing:
            raise RunError(
                f"{what} differ between the processes of the run: {names[differing[0]]} "
                f"({len(differing)} tensors in all). A device or the communication between them "
                f"is faulty; the last checkpoint is from before."
            )


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Mean of the gradients over processes, in place.

    One sum over one buffer of fixed layout after the backward pass, rather than
    DistributedDataParallel: its buckets are laid out anew after the first step, so that sums of
    three or more processes would round differently in a continued run.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = world.sum(torch.cat([g.flatten() for g in gradients])) / world.size
    slices = torch.split(mean, [g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(slices, gradients, strict=True)])


def _digest(tensor: Tensor) -> Tensor:
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256(plain.numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def world_size() -> int:
    """Processes of the run, by the environment that torchrun sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone.

    device: auto, cpu, cuda; on several processes each takes the GPU of its local rank.
    Raises UsageError when there are more processes than GPUs on this machine.
    """
    size = world_size()
    if size == 1:
        yield World(choose_device(device))
        return
    chosen, local = choose_device(device), int(os.environ["LOCAL_RANK"])
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise UsageError(f"--device {device}: with several processes each takes its own GPU.")
        choose_device(f"cuda:{local}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield World(chosen, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
