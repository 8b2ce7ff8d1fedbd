"""What each process of a distributed test does; test_distributed.py starts the processes.

Every check compares with the whole global batch computed in one piece, and fails its process.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dupr_cli.errors import RunError
from dupr_cli.models.batch_norm import commit_statistics, group_batch_norms
from dupr_cli.pretrain.encoders import Embeddings
from dupr_cli.runtime.parallel import World, average_gradients, join


def exchange(world: World) -> None:
    rows = 6
    whole = torch.arange(rows * world.size * 2).view(-1, 2)
    own = whole[world.rank * rows : (world.rank + 1) * rows]
    for seed in range(20):
        order = torch.randperm(rows * world.size, generator=torch.Generator().manual_seed(seed))
        expected = whole[order].view(world.size, rows, 2)[world.rank]
        for dtype in (torch.int64, torch.float32, torch.uint8, torch.bool):
            moved = world.exchange(own.to(dtype), order)
            assert moved.dtype == dtype
            assert torch.equal(moved, expected.to(dtype))
        back = world.exchange(world.exchange(own, order), order.argsort())
        assert torch.equal(back, own)
        # Vectors and maps of patches come back together.
        embeddings = Embeddings(
            {"res5": own.float()}, {"res4": own.float()[:, None].repeat(1, 3, 1)}
        )
        there = embeddings.map(partial(world.exchange, order=order))
        assert torch.equal(there.patch["res4"][:, 1], there.image["res5"])
    assert torch.equal(world.gather(own), whole)
    assert world.sum(torch.tensor(1.0)) == world.size
    assert world.max(torch.tensor(float(world.rank))) == world.size - 1


def batch_norm(world: World) -> None:
    """Synchronised: values, gradients and statistics of one batch norm over the global batch."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4 * world.size, 3, 5, 5, generator=generator) * 3 + 1
    weights = torch.randn(4 * world.size, 3, 5, 5, generator=generator)
    plain, synchronised = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    group_batch_norms(synchronised, 1, sync=True)
    rows = slice(4 * world.rank, 4 * world.rank + 4)
    ours, theirs = whole[rows].clone().requires_grad_(), whole.clone().requires_grad_()
    (plain(theirs) * weights).sum().backward()
    (synchronised(ours) * weights[rows]).sum().backward()
    commit_statistics([synchronised], world)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(synchronised(ours), plain(theirs)[rows], atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad[rows], atol=1e-5)
    for name in ("running_mean", "running_var"):
        # The comparison above was a second step of the plain one.
        assert torch.allclose(
            getattr(synchronised, name), first_statistics(whole)[name], atol=1e-5
        ), name


def first_statistics(whole: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = nn.BatchNorm2d(3)
    plain(whole)
    return plain.state_dict()


def gradients(world: World) -> None:
    layers = nn.Linear(3, 2), nn.Linear(2, 1)
    parameters = [p for layer in layers for p in layer.parameters()]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number + world.rank))
    average_gradients(parameters, world)
    for number, parameter in enumerate(parameters):
        assert parameter.grad is not None
        assert torch.equal(
            parameter.grad, torch.full_like(parameter, number + (world.size - 1) / 2)
        )


def difference(world: World) -> None:
    """One bit of one queue differs on one process: every process says so."""
    queue = F.normalize(torch.ones(8, 4), dim=1)
    world.require_same({"queue": queue, "other": torch.zeros(3)}, "queues")
    if world.rank == 1:
        queue[3, 2] = torch.nextafter(queue[3, 2], torch.tensor(1.0))
    with pytest.raises(RunError, match="queues differ between the processes"):
        world.require_same({"queue": queue, "other": torch.zeros(3)}, "queues")


def check_all() -> None:
    with join("cpu") as world:
        for check in (exchange, batch_norm, gradients, difference):
            check(world)
            dist.barrier()
