"""Backbones: networks as feature extractors over levels res2..res5.

Every stage that handles a network uses them. A ResNet's state-dict names are torchvision's own,
without fc, so that weights move between stages and to other tools without renaming. Any network
that timm can cut into levels can be pre-trained, as `timm:NAME`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, cast

from torch import Tensor, nn

from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.models.timm import TimmBackbone
from dupr_cli.recipe.base import TIMM, Level


class Backbone(Protocol):
    """The interface that pre-training needs. Implementations are nn.Modules.

    channels, strides: of each level's feature map. first_centres: pixels from the left and upper
    edge of an image to the centre of a level's first cell. recompute: levels are recomputed in the
    backward pass instead of being stored (activation checkpointing), which trades time for memory.
    """

    architecture: str
    channels: dict[Level, int]
    strides: dict[Level, int]
    first_centres: dict[Level, float]
    recompute: bool

    def __call__(
        self, images: Tensor, levels: Collection[Level] = ..., last: Level = ...
    ) -> dict[Level, Tensor]: ...

    def after(self, last: Level) -> list[nn.Module]:
        """The modules that need not be computed when `last` is the last level wanted."""
        ...


def as_backbone(module: nn.Module) -> Backbone:
    """The module typed as a `Backbone`."""
    return cast(Backbone, module)


def make_backbone(architecture: str) -> nn.Module:
    """A randomly initialised `Backbone`: torchvision's ResNet of that name, or `timm:NAME`.

    Raises UsageError when timm is not installed, or its network does not have levels of stride
    4, 8, 16 and 32.
    """
    if architecture.startswith(TIMM):
        return TimmBackbone(architecture)
    return ResNetBackbone(architecture)
