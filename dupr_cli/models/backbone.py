"""Backbones: networks as feature extractors over levels res2..res5.

Every stage that handles a network uses them. State-dict names are those of the network's own
library, without the classifier, so that weights move between stages and to other tools without
renaming.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol, cast

from torch import Tensor, nn

from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import UsageError
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.models.resnet_shapes import Shape, is_torchvision, resnet_shapes
from dupr_cli.plugins import BACKBONES, load_plugin, plugin_names
from dupr_cli.recipe.base import Level


class Backbone(Protocol):
    """The interface that every stage needs. Implementations are nn.Modules.

    in_channels: of an image. levels: those that the network has, in order. channels, strides: of
    each level's feature map. first_centres: pixels from the left and upper edge of an image to the
    centre of a level's first cell. recompute: levels are recomputed in the backward pass instead of
    being stored (activation checkpointing), which trades time for memory.
    """

    architecture: str
    in_channels: int
    levels: tuple[Level, ...]
    channels: dict[Level, int]
    strides: dict[Level, int]
    first_centres: dict[Level, float]
    recompute: bool

    def __call__(
        self, images: Tensor, levels: Collection[Level] = ..., last: Level = ...
    ) -> dict[Level, Tensor]:
        """Feature maps (N, C, H/stride, W/stride) of the wanted levels that the network has."""
        ...

    def after(self, last: Level) -> list[nn.Module]:
        """The modules that need not be computed when `last` is the last level wanted."""
        ...

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names of the state dict; earlier versions may have named them
        otherwise."""
        ...


def as_backbone(module: nn.Module) -> Backbone:
    """The module typed as a `Backbone`."""
    return cast(Backbone, module)


def make_backbone(architecture: str, channels: int = 3) -> nn.Module:
    """A randomly initialised `Backbone`: torchvision's ResNet of that name, or FAMILY:NAME.

    channels: of an image; other numbers than 3 give another first convolution.
    Raises UsageError when there is no such family or network, its library is not installed, or it
    has none of the levels.
    """
    family, separator, _ = architecture.partition(":")
    if not separator:
        return ResNetBackbone(architecture, channels)
    if family not in plugin_names(BACKBONES):
        raise UsageError(
            f"{architecture}: there are no backbones of the family {family!r}; the families are "
            f"{', '.join(plugin_names(BACKBONES))}. Install the package that provides it."
        )
    make = cast("Callable[[str, int], nn.Module]", load_plugin(BACKBONES, family))
    return make(architecture, channels)


def require_levels(backbone: nn.Module, levels: Collection[Level], purpose: str) -> None:
    """Raises UsageError when the backbone lacks one of the levels. purpose: begins the message."""
    has = as_backbone(backbone).levels
    missing = [level for level in levels if level not in has]
    if missing:
        raise UsageError(
            f"{purpose}: {as_backbone(backbone).architecture} has the levels {', '.join(has)}, "
            f"but not {', '.join(missing)}."
        )


def require_levels_of(architecture: str, levels: Collection[Level], purpose: str) -> None:
    """`require_levels` for a network by its name; torchvision's ResNets, which have all levels, are
    not built. Raises UsageError also as `make_backbone` does."""
    if not is_torchvision(architecture):
        require_levels(make_backbone(architecture), levels, purpose)


def load_backbone(module: nn.Module, weights: Weights) -> int:
    """Load weights into a `Backbone`, all tensors or none; returns their number.

    Raises UsageError with the names that do not match when the weights are incomplete or belong to
    another architecture.
    """
    backbone = as_backbone(module)
    given = backbone.own_names(weights.tensors)
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _require_same(own, given, weights, backbone.architecture)
    module.load_state_dict(given)
    return len(own)


def require_fit(weights: Weights, architecture: str, channels: int) -> int:
    """Whether `load_backbone` would load the weights into this architecture; returns the number of
    tensors. torchvision's ResNets are not built. Raises UsageError as both functions do."""
    if not is_torchvision(architecture):
        return load_backbone(make_backbone(architecture, channels), weights)
    own = resnet_shapes(architecture, channels)
    _require_same(own, weights.tensors, weights, architecture)
    return len(own)


def _require_same(
    own: Mapping[str, Shape], given: Mapping[str, Tensor], weights: Weights, wanted: str
) -> None:
    """own: names and shapes of a network's tensors. given: the weights under its names."""
    missing = sorted(own.keys() - given.keys())
    unknown = sorted(given.keys() - own.keys())
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {own[name]}"
        for name in own.keys() & given.keys()
        if own[name] != tuple(given[name].shape)
    ]
    if missing or unknown or shapes:
        matched = len(own) - len(missing) - len(shapes)
        parts = [
            f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
            for names, what in (
                (missing, "missing"),
                (unknown, "unknown"),
                (shapes, "of another shape"),
            )
            if names
        ]
        theirs = weights.metadata.architecture
        of = "" if theirs == wanted else f" of a {theirs}"
        raise UsageError(
            f"{weights.address}: the weights{of} do not fit a {wanted}: "
            f"{matched} of {len(own)} tensors match, {', '.join(parts)}. Nothing was loaded."
        )


def fitted(weights: Weights) -> Weights:
    """The weights under the present names. Raises UsageError when they do not fit."""
    backbone = make_backbone(weights.metadata.architecture, weights.metadata.input.channels)
    load_backbone(backbone, weights)
    return replace(weights, tensors=as_backbone(backbone).own_names(weights.tensors))
