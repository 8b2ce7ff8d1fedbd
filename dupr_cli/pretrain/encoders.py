"""Query and key encoders: a backbone, and per level an image head and a patch head.

Also what MoCo needs around them: batch norm in groups (many devices' statistics on one), the
momentum update, and the key queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.backbones import as_backbone, make_backbone
from dupr_cli.geometry import pool_patches
from dupr_cli.parallel import World
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.pretrain import PretrainRecipe


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised embeddings of a batch: image[level] (N, D), patch[level] (N, S * S, D).

    features[level] (N, S * S, C): pooled feature maps, for methods that match patches by them.
    """

    image: dict[Level, Tensor]
    patch: dict[Level, Tensor]
    features: dict[Level, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Embeddings:
        """The same with every tensor changed."""
        return Embeddings(
            *(
                {level: change(values) for level, values in part.items()}
                for part in (self.image, self.patch, self.features)
            )
        )

    def part(self, rows: slice) -> Embeddings:
        """The embeddings of some of the images."""
        return self.map(lambda values: values[rows])


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """The embeddings of consecutive parts of a batch as those of the batch."""

    def joined(kind: str) -> dict[Level, Tensor]:
        of_parts = [getattr(part, kind) for part in parts]
        return {level: torch.cat([values[level] for values in of_parts]) for level in of_parts[0]}

    return Embeddings(joined("image"), joined("patch"), joined("features"))


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics come from `groups` equal parts of its input.

    On one device it stands for the per-device statistics of several: with keys in another order
    than queries, the statistics do not tell which key belongs to which query. With `sync` the
    statistics are those of all processes' inputs.

    Training statistics are collected and enter the running ones by `commit_statistics`, as the
    mean over all groups of a step: however the batch is split over devices and parts, they come out
    the same, and a step that is skipped leaves no trace.
    Source: docs/method.md, "Batch norm".
    """

    groups: int = 1
    sync: bool = False
    plain: ClassVar[type[nn.BatchNorm2d]] = nn.BatchNorm2d
    collected: Tensor  # (3, C): sums of means, of variances, and how many there are

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, H, W) with N a multiple of `groups`; group g holds rows g*N/groups on."""
        if not self.training:
            return super().forward(input)
        if self.sync:
            return self._synchronised(input)
        return torch.cat([self._normalised(part) for part in input.chunk(self.groups)])

    def _normalised(self, part: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(self.collected[0]), torch.zeros_like(self.collected[0])
        # With momentum 1 the running statistics are those of this part.
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
            # Recomputation in the backward pass adds the same values again: the mean stays.
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
    """Turn every BatchNorm2d of a module into one that normalises in groups, state kept."""
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
    """The grouped form of a batch norm, also of timm's, which go on with drop and activation."""
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
    """Back to the batch norms as they were, state kept, for evaluation."""
    for child in _batch_norms(module):
        child.__class__ = child.plain  # type: ignore[assignment]


@torch.no_grad()
def commit_statistics(modules: Sequence[nn.Module], world: World) -> None:
    """Let what was collected since the last call enter the running statistics, once."""
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
    """Forget what was collected: of a step that is skipped."""
    for module in modules:
        for norm in _batch_norms(module):
            norm.collected.zero_()


def _head(kind: str, channels: int, dim: int) -> nn.Module:
    # Linear layers on the last axis: for patches the same as 1x1 convolutions on the pooled grid.
    if kind == "linear":
        return nn.Linear(channels, dim)
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))


class Encoder(nn.Module):
    """Backbone and heads.

    Heads are not shared between levels nor kinds, and have no batch norm.
    Source: docs/method.md, "Heads".
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        method = recipe.method
        self.backbone = make_backbone(recipe.model.backbone)
        self.image_levels = [v for v in LEVELS if method.image.weights.get(v)]
        self.patch_levels = [v for v in LEVELS if method.patch.weights.get(v)]
        self.levels = [v for v in LEVELS if v in {*self.image_levels, *self.patch_levels}]
        for module in as_backbone(self.backbone).after(self.levels[-1]):
            module.requires_grad_(False)  # not computed, so never with a gradient
        self.bins = dict(method.patch.bins)
        channels, dim = as_backbone(self.backbone).channels, method.embedding_dim
        self.image_heads = nn.ModuleDict(
            {v: _head(method.image.head, channels[v], dim) for v in self.image_levels}
        )
        self.patch_heads = nn.ModuleDict(
            {v: _head(method.patch.head, channels[v], dim) for v in self.patch_levels}
        )

    def features(self, views: Tensor) -> dict[Level, Tensor]:
        """Feature maps of the levels that have a loss."""
        maps: dict[Level, Tensor] = self.backbone(views, self.levels, self.levels[-1])
        return maps

    def embed_images(self, features: dict[Level, Tensor]) -> dict[Level, Tensor]:
        """Image embeddings (N, D) of each level, from its pooled feature map."""
        pooled = {level: features[level].float().mean((2, 3)) for level in self.image_levels}
        return {v: F.normalize(self.image_heads[v](x).float(), dim=-1) for v, x in pooled.items()}

    def embed_patches(self, pooled: dict[Level, Tensor]) -> dict[Level, Tensor]:
        """Patch embeddings (N, S * S, D) of each level, from its pooled bins (N, S * S, C)."""
        return {v: F.normalize(self.patch_heads[v](x).float(), dim=-1) for v, x in pooled.items()}

    def forward(self, views: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
        """views: (N, 3, S, S) normalised; boxes: (N, 4) shared regions; flips: (N,) bool."""
        features = self.features(views)
        # Pool before projecting: the head is an MLP, so the two do not commute.
        pooled = {
            v: pool_patches(features[v], boxes, flips, self.bins[v], LEVEL_STRIDES[v])
            for v in self.patch_levels
        }
        return Embeddings(self.embed_images(features), self.embed_patches(pooled))


@torch.no_grad()
def momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """key = momentum * key + (1 - momentum) * query, for parameters.

    Buffers stay the key encoder's own: its batch norms see its own batches.
    Source: MoCo (arXiv 1911.05722), equation 2.
    """
    # Private by name only: torch's own optimisers and EMA code rest on it.
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)


class KeyQueue(nn.Module):
    """The newest `length` keys, first in first out. Starts with random unit vectors, as MoCo's.

    keys: (length, dim), L2-normalised, float32. pushed: how many keys ever entered.
    """

    keys: Tensor
    pushed: Tensor

    def __init__(self, length: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        start = F.normalize(torch.randn(length, dim, generator=generator), dim=1)
        self.register_buffer("keys", start)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` (M, dim), M at most the length."""
        length = len(self.keys)
        first = torch.arange(len(keys), device=keys.device)
        self.keys[(self.pushed + first) % length] = keys.to(self.keys.dtype)
        self.pushed.add_(len(keys))

    def fill(self) -> float:
        """Share of the queue that holds keys of images, not the random start."""
        return min(1.0, int(self.pushed) / len(self.keys))


class KeyQueues(nn.ModuleDict):
    """One queue per level."""

    def __init__(
        self, levels: list[Level], length: int, dim: int, generator: torch.Generator
    ) -> None:
        super().__init__({level: KeyQueue(length, dim, generator) for level in levels})

    def __getitem__(self, level: str) -> KeyQueue:
        queue = super().__getitem__(level)
        assert isinstance(queue, KeyQueue)
        return queue
