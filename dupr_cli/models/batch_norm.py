"""Batch norm in groups: the statistics of many devices on one, in one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.runtime.parallel import World


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics come from `groups` equal parts of its input.

    On one device it imitates the per-device statistics of several devices: with keys in another
    order than queries, the statistics do not reveal which key belongs to which query. With `sync`
    the statistics cover the inputs of all processes.

    Training statistics are collected, and `commit_statistics` adds them to the running ones as the
    mean over all groups of a step. They do not depend on how the batch is split over devices and
    parts, and a skipped step leaves no trace.
    Source: docs/method.md, "Batch norm".
    """

    groups: int = 1
    sync: bool = False
    plain: ClassVar[type[nn.BatchNorm2d]] = nn.BatchNorm2d
    collected: Tensor  # (3, C): sums of means, of variances, and their number

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, H, W) with N a multiple of `groups`; group g holds rows g*N/groups on."""
        if not self.training:
            return super().forward(input)
        if self.sync:
            return self._synchronised(input)
        return torch.cat([self._normalised(part) for part in input.chunk(self.groups)])

    def _normalised(self, part: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(self.collected[0]), torch.zeros_like(self.collected[0])
        # With momentum 1, the running statistics become those of this part.
        result = F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        self._collect(mean, variance)
        return result

    def _synchronised(self, input: Tensor) -> Tensor:
        x = input.float()
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        moments = _mean_over_processes(moments)
        mean, variance = moments[0], (moments[1] - moments[0].square()).clamp(min=0)
        count = x.numel() // x.shape[1] * _processes()
        self._collect(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        scale = (self.weight * (variance + self.eps).rsqrt())[:, None, None]
        return ((x - mean[:, None, None]) * scale + self.bias[:, None, None]).to(input.dtype)

    def _collect(self, mean: Tensor, variance: Tensor) -> None:
        with torch.no_grad():
            # Recomputation in the backward pass adds the same values again, which keeps the mean.
            self.collected.add_(torch.stack([mean, variance, torch.ones_like(mean)]))


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _mean_over_processes(values: Tensor) -> Tensor:
    """Mean over all processes; gradients flow to the inputs of all of them."""
    if _processes() == 1:
        return values
    total: Tensor = torch.distributed.nn.functional.all_reduce(values)  # type: ignore[no-untyped-call]
    return total / _processes()


def _batch_norms(module: nn.Module) -> list[GroupedBatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, GroupedBatchNorm2d)]


def group_batch_norms(module: nn.Module, groups: int, sync: bool = False) -> None:
    """Turn every BatchNorm2d of a module into one that normalises in groups; keeps its state."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = _grouped(type(child))  # type: ignore[arg-type]
            assert isinstance(child, GroupedBatchNorm2d)
            child.groups, child.sync = groups, sync
            assert child.running_mean is not None
            collected = child.running_mean.new_zeros(3, child.num_features)
            child.register_buffer("collected", collected, persistent=False)


@cache
def _grouped(kind: type[nn.BatchNorm2d]) -> type[nn.BatchNorm2d]:
    """The grouped form of a batch norm, including timm's with its drop and activation layers."""
    if issubclass(kind, GroupedBatchNorm2d):
        return kind
    if kind is nn.BatchNorm2d:
        return GroupedBatchNorm2d

    class GroupedWithActivation(GroupedBatchNorm2d):
        plain = kind

        def forward(self, input: Tensor) -> Tensor:
            x: Tensor = super().forward(input)
            for name in ("drop", "act"):
                x = self.get_submodule(name)(x)
            return x

    return GroupedWithActivation


def ungroup_batch_norms(module: nn.Module) -> None:
    """Restore the original batch norms for evaluation; keeps their state."""
    for child in _batch_norms(module):
        child.__class__ = child.plain  # type: ignore[assignment]


@torch.no_grad()
def commit_statistics(modules: Sequence[nn.Module], world: World) -> None:
    """Add the statistics collected since the last call to the running ones, once."""
    norms = [norm for module in modules for norm in _batch_norms(module)]
    if not norms:
        return
    sums = world.sum(torch.cat([norm.collected.flatten() for norm in norms]))
    start = 0
    for norm in norms:
        mean, variance, count = sums[start : start + 3 * norm.num_features].view(3, -1)
        start += 3 * norm.num_features
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean / count, norm.momentum)
        norm.running_var.lerp_(variance / count, norm.momentum)
        norm.num_batches_tracked.add_(1)
    drop_statistics(modules)


@torch.no_grad()
def drop_statistics(modules: Sequence[nn.Module]) -> None:
    """Discard the collected statistics of a skipped step."""
    for module in modules:
        for norm in _batch_norms(module):
            norm.collected.zero_()


@contextmanager
def measured_statistics(module: nn.Module) -> Iterator[None]:
    """Replace running statistics by the mean over the batches that pass the module inside.

    The moving averages belong to weights that were still changing, and a random network has none.
    Testing needs statistics of the final weights, which this measures. The module is in training
    mode inside, and in evaluation mode afterwards. Frozen norms have no statistics and stay.
    Source: precise BN in detectron2 (Wu and Johnson 2021, section 3).
    """
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = [child for child in module.modules() if isinstance(child, kinds)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    module.train()
    with torch.no_grad():
        yield
    module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
