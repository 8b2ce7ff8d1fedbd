"""Query and key encoders: a backbone, with an image head and a patch head per level.

This module also holds what MoCo needs around them: batch norm in groups (the statistics of many
devices, on one), the momentum update, and the key queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.recipe.base import LEVELS, Level
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.runtime.phases import phase
from dupr_cli.views.geometry import Grid, pool_patches


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised embeddings of a batch: image[level] (N, D), patch[level] (N, S * S, D).

    features[level] (N, S * S, C): pooled feature maps, for methods that match patches by them.
    summaries[level] (N, D): one patch embedding of a whole view, for methods that queue it.
    """

    image: dict[Level, Tensor]
    patch: dict[Level, Tensor]
    features: dict[Level, Tensor] = field(default_factory=dict)
    summaries: dict[Level, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Embeddings:
        """Embeddings of the same images with every tensor changed."""
        return Embeddings(
            *(
                {level: change(values) for level, values in part.items()}
                for part in (self.image, self.patch, self.features, self.summaries)
            )
        )

    def part(self, rows: slice) -> Embeddings:
        """The embeddings of some of the images."""
        return self.map(lambda values: values[rows])


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """Join the embeddings of consecutive parts of a batch."""

    def joined(kind: str) -> dict[Level, Tensor]:
        of_parts = [getattr(part, kind) for part in parts]
        return {level: torch.cat([values[level] for values in of_parts]) for level in of_parts[0]}

    return Embeddings(joined("image"), joined("patch"), joined("features"), joined("summaries"))


def _head(kind: str, channels: int, dim: int) -> nn.Module:
    # Linear layers act on the last axis: on patches they equal 1x1 convolutions on the pooled grid.
    if kind == "linear":
        return nn.Linear(channels, dim)
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))


def grid(backbone: nn.Module, level: Level, cell_centres: str) -> Grid:
    """Where the cells of a level are taken to lie. cell_centres: see `PatchReidSection`."""
    shape = as_backbone(backbone)
    stride = shape.strides[level]
    half = cell_centres == "convention"
    return Grid(stride, stride / 2 if half else shape.first_centres[level])


class Encoder(nn.Module):
    """Backbone and heads.

    Levels and kinds do not share heads, and heads have no batch norm.
    Source: docs/method.md, "Heads".
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        method = recipe.method
        self.backbone = make_backbone(recipe.model.backbone, method.augmentation.channels)
        self.image_levels = [v for v in LEVELS if method.image.weights.get(v)]
        self.patch_levels = [v for v in LEVELS if method.patch.weights.get(v)]
        self.levels = method.levels
        for module in as_backbone(self.backbone).after(self.levels[-1]):
            module.requires_grad_(False)  # never computed, so it gets no gradient
        self.bins = dict(method.patch.bins)
        centres = method.patch.cell_centres
        self.grids = {v: grid(self.backbone, v, centres) for v in self.patch_levels}
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
        """views: (N, C, S, S) normalised; boxes: (N, 4) shared regions; flips: (N,) bool."""
        features = self.features(views)
        # Pool before projecting: the head is an MLP, so the two do not commute.
        with phase("patch pooling"):
            pooled = {
                v: pool_patches(features[v], boxes, flips, self.bins[v], self.grids[v])
                for v in self.patch_levels
            }
        with phase("heads"):
            return Embeddings(self.embed_images(features), self.embed_patches(pooled))


@torch.no_grad()
def momentum_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """key = momentum * key + (1 - momentum) * query, for parameters.

    Buffers stay the key encoder's own: its batch norms see its own batches.
    Source: MoCo (arXiv 1911.05722), equation 2.
    """
    # torch._foreach_* is private by name only: torch's own optimisers and EMA code use it.
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)


class KeyQueue(nn.Module):
    """The newest `length` keys, first in first out. It starts with random unit vectors, as MoCo's.

    keys: (length, dim), L2-normalised, float32. pushed: how many keys have ever entered.
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
        """Share of the queue that holds keys of images instead of the random start."""
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
