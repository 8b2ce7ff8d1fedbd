"""Backbones: networks as feature extractors over levels res2..res5.

Used by every stage that touches a network. A ResNet's state-dict names are torchvision's own,
without fc, so that weights move between stages and to other tools without renaming. Any network
that timm can cut into levels serves for pre-training, as `timm:NAME`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, cast

from torch import Tensor, nn

from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.models.timm import TimmBackbone
from dupr_cli.recipe.base import TIMM, Level


class Backbone(Protocol):
    """What pre-training needs of a network. It is an nn.Module besides.

    channels: of each level's feature map. recompute: levels are computed anew in the backward pass
    instead of being kept (activation checkpointing), which saves memory for time.
    """

    architecture: str
    channels: dict[Level, int]
    recompute: bool

    def __call__(
        self, images: Tensor, levels: Collection[Level] = ..., last: Level = ...
    ) -> dict[Level, Tensor]: ...

    def after(self, last: Level) -> list[nn.Module]:
        """The modules that are not computed when `last` is the last level wanted."""
        ...


def as_backbone(module: nn.Module) -> Backbone:
    """The module seen as a `Backbone`, for type checkers."""
    return cast(Backbone, module)


def make_backbone(architecture: str) -> nn.Module:
    """A randomly initialised `Backbone`: torchvision's ResNet of that name, or `timm:NAME`.

    Raises UsageError when timm is not installed, or does not have the network in levels of stride
    4, 8, 16 and 32.
    """
    if architecture.startswith(TIMM):
        return TimmBackbone(architecture)
    return ResNetBackbone(architecture)
