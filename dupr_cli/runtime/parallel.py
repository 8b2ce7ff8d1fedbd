"""The processes of a run: a single one, or several that torch.distributed connects.

Each process takes an equal part of the global batch, in rank order. For a single process every
function here is the identity or plain indexing, so the trainer needs no second version. Small
tensors on the CPU are sent by gloo, those on a GPU by NCCL.
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

# Longer than a probe or writing a checkpoint, during which the others wait for rank 0.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """This process among those of the run. device: on which it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over all processes."""
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
        """This process's part of the global batch after reordering.

        values: (N, ...), this process's rows. order: (size * N,), on the CPU and equal in all
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
        # Rows arrive grouped by owner, in their original order within each group.
        places = owners.argsort(stable=True).to(values.device)
        result = torch.empty_like(received)
        result[places] = received
        return result.to(values.dtype)

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def require_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises RunError when a tensor differs between processes in any bit.

        Processes start equal and see the same data, so a difference means a faulty machine or
        library.
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
                f"({len(differing)} tensors in all). A device or the communication between devices "
                f"is faulty; the last checkpoint was written before this fault was found."
            )


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Mean of the gradients over processes, in place.

    This is one sum over one buffer of fixed layout after the backward pass. DistributedDataParallel
    rearranges its buckets after the first step, so sums over three or more processes would be
    rounded differently in a continued run.
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
    """Number of processes of the run, from the environment that torchrun sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if any.

    device: auto, cpu, cuda; of several processes, each takes the GPU of its local rank.
    Raises UsageError when this machine has more processes than GPUs.
    """
    size = world_size()
    if size == 1:
        yield World(choose_device(device))
        return
    chosen, local = choose_device(device), int(os.environ["LOCAL_RANK"])
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise UsageError(
                f"--device {device}: each of several processes takes its own GPU; use cuda or auto."
            )
        choose_device(f"cuda:{local}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield World(chosen, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
