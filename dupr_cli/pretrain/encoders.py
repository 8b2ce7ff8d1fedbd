"""Query and key encoders: a backbone, and per level an image head and a patch head.

Also what MoCo needs around them: batch norm in groups (many devices' statistics on one), the
momentum update, and the key queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.backbones import ResNetBackbone
from dupr_cli.pretrain.geometry import pool_patches
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.pretrain import PretrainRecipe


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised embeddings of a batch: image[level] (N, D), patch[level] (N, S * S, D)."""

    image: dict[Level, Tensor]
    patch: dict[Level, Tensor]

    def select(self, rows: Tensor) -> Embeddings:
        """The embeddings of the images `rows` (N,), in that order."""
        return Embeddings(
            {level: values[rows] for level, values in self.image.items()},
            {level: values[rows] for level, values in self.patch.items()},
        )


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics come from `groups` equal parts of the batch.

    On one device it stands for the per-device statistics of several: with keys in another order
    than queries, the statistics do not tell which key belongs to which query.
    Running statistics are the mean over the groups. In evaluation mode it is plain batch norm.
    Source: docs/method.md, "Batch norm".
    """

    groups: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, H, W) with N a multiple of `groups`; group g holds rows g*N/groups on."""
        if not self.training or self.groups == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / int(self.num_batches_tracked)
        means, variances, parts = [], [], []
        for part in input.chunk(self.groups):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            parts.append(
                F.batch_norm(part, mean, variance, self.weight, self.bias, True, momentum, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(parts)


def group_batch_norms(module: nn.Module, groups: int) -> None:
    """Turn every BatchNorm2d of a module into one that normalises in groups, state kept."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = GroupedBatchNorm2d
            assert isinstance(child, GroupedBatchNorm2d)
            child.groups = groups


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
        self.backbone = ResNetBackbone(recipe.model.backbone)
        group_batch_norms(self.backbone, method.batch_norm.groups)
        self.image_levels = [v for v in LEVELS if method.image.weights.get(v)]
        self.patch_levels = [v for v in LEVELS if method.patch.weights.get(v)]
        self.bins = dict(method.patch.bins)
        channels, dim = self.backbone.channels, method.embedding_dim
        self.image_heads = nn.ModuleDict(
            {v: _head(method.image.head, channels[v], dim) for v in self.image_levels}
        )
        self.patch_heads = nn.ModuleDict(
            {v: _head(method.patch.head, channels[v], dim) for v in self.patch_levels}
        )

    def forward(self, views: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
        """views: (N, 3, S, S) normalised; boxes: (N, 4) shared regions; flips: (N,) bool."""
        levels = {*self.image_levels, *self.patch_levels}
        last = max(levels, key=LEVELS.index)
        features = self.backbone(views, levels, last)
        image, patch = {}, {}
        for level in self.image_levels:
            pooled = features[level].float().mean((2, 3))
            image[level] = F.normalize(self.image_heads[level](pooled).float(), dim=-1)
        for level in self.patch_levels:
            # Pool before projecting: the head is an MLP, so the two do not commute.
            pooled = pool_patches(
                features[level], boxes, flips, self.bins[level], LEVEL_STRIDES[level]
            )
            patch[level] = F.normalize(self.patch_heads[level](pooled).float(), dim=-1)
        return Embeddings(image, patch)


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

    keys: (length, dim), L2-normalised, float32.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, length: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        start = F.normalize(torch.randn(length, dim, generator=generator), dim=1)
        self.register_buffer("keys", start)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` (M, dim); the recipe makes M divide the length."""
        start = int(self.pointer)
        self.keys[start : start + len(keys)] = keys
        self.pointer.fill_((start + len(keys)) % len(self.keys))


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
