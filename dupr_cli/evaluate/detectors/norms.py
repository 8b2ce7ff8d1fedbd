"""Norms of a detector: batch norm over one device or all of them, group norm, frozen batch norm.

Detection batches are small (2 images per device in the protocols), and so are the samples behind
the batch statistics; the protocols therefore synchronise them over devices.
Source: docs/method.md, "R50-C4, shared"; Wu and He 2018 (group norm).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dupr_cli.models.backbone import as_backbone
from dupr_cli.recipe.base import Level

_GROUPS = 32


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the inputs of all processes, on any device.

    torch's SyncBatchNorm works on GPUs only; this one also serves processes on CPUs. Inputs of the
    processes may differ in size: every value has the same weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_full((1, x.shape[1]), x.numel() / x.shape[1])
        sums = torch.cat([x.sum((0, 2, 3))[None], x.square().sum((0, 2, 3))[None], count])
        total, squares, n = torch.distributed.nn.functional.all_reduce(sums)  # type: ignore[no-untyped-call]
        mean = total / n
        variance = (squares / n - mean.square()).clamp(min=0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (n / (n - 1).clamp(min=1)), rate)
        scale = (self.weight * (variance + self.eps).rsqrt())[:, None, None]
        result: Tensor = (x - mean[:, None, None]) * scale + self.bias[:, None, None]
        return result.to(input.dtype)


def make_norm(kind: str) -> Callable[[int], nn.Module]:
    """A function from channels to a layer: sync, batch, group or none (`detector.new_norm`)."""
    if kind == "group":
        return lambda channels: nn.GroupNorm(_GROUPS, channels)
    if kind == "none":
        return lambda _channels: nn.Identity()
    if kind == "sync":
        return _synchronised
    return nn.BatchNorm2d


def _synchronised(channels: int) -> nn.Module:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return nn.BatchNorm2d(channels)
    if dist.get_backend() == "gloo":
        return SyncedBatchNorm2d(channels)
    return nn.SyncBatchNorm(channels)


def replace_batch_norms(module: nn.Module, kind: str) -> None:
    """Convert every BatchNorm2d of `module` to the form of `detector.norm`, keeping its state.

    frozen: a constant scale and shift made from its statistics.
    """
    for child in list(module.children()):
        if isinstance(child, nn.BatchNorm2d):
            _replace(module, child, kind)
        else:
            replace_batch_norms(child, kind)


def _replace(parent: nn.Module, child: nn.BatchNorm2d | nn.SyncBatchNorm, kind: str) -> None:
    state = child.state_dict()
    if kind == "frozen":
        del state["num_batches_tracked"]
        new: nn.Module = FrozenBatchNorm2d(child.num_features, child.eps)
    else:
        new = make_norm(kind)(child.num_features)
    new.load_state_dict(state)
    for name, known in list(parent.named_children()):
        if known is child:
            setattr(parent, name, new)


def freeze_up_to(backbone: nn.Module, level: Level) -> None:
    """Make constants of the backbone's parameters and norms up to a level; the rest is trained.

    The norms keep the statistics that they have now.
    """
    trained = {id(m) for part in as_backbone(backbone).after(level) for m in part.modules()}
    for module in list(backbone.modules()):
        if id(module) in trained:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        for child in list(module.children()):
            if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm) and id(child) not in trained:
                _replace(module, child, "frozen")


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The norms of a network that use batch statistics."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [child for child in module.modules() if isinstance(child, kinds)]
