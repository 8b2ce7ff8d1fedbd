"""Backbones: networks as feature extractors over levels res2..res5.

Used by every stage that touches a network. A ResNet's state-dict names are torchvision's own,
without fc, so that weights move between stages and to other tools without renaming. Any network
that timm can cut into levels serves for pre-training, as `timm:NAME`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, cast, get_args

import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dupr_cli.errors import UsageError
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, TIMM, Level
from dupr_cli.recipe.base import Backbone as TorchvisionName

_STAGES: dict[Level, str] = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


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


def make_backbone(architecture: str) -> nn.Module:
    """A randomly initialised `Backbone`: torchvision's ResNet of that name, or `timm:NAME`.

    Raises UsageError when timm is not installed, or does not have the network in levels of stride
    4, 8, 16 and 32.
    """
    if architecture.startswith(TIMM):
        return TimmBackbone(architecture)
    return ResNetBackbone(architecture)


def as_backbone(module: nn.Module) -> Backbone:
    """The module seen as a `Backbone`, for type checkers."""
    return cast(Backbone, module)


class ResNetBackbone(nn.Module):
    """conv1 to layer4 of a torchvision ResNet, ResNeXt or wide ResNet.

    Source: He et al. 2016, with the stride in the 3x3 convolution as torchvision has it.
    """

    def __init__(self, architecture: str) -> None:
        """Raises UsageError for what is no ResNet of torchvision's."""
        super().__init__()
        if architecture not in get_args(TorchvisionName):
            raise UsageError(
                f"{architecture} is no ResNet of torchvision's. Pre-training takes timm's networks "
                f"too; export and evaluation know {', '.join(get_args(TorchvisionName))}."
            )
        self.architecture = architecture
        self.recompute = False
        network = torchvision.models.get_model(architecture, weights=None)
        self.conv1: nn.Module = network.conv1
        self.bn1: nn.Module = network.bn1
        self.relu: nn.Module = network.relu
        self.maxpool: nn.Module = network.maxpool
        for stage in _STAGES.values():
            setattr(self, stage, getattr(network, stage))
        self.channels: dict[Level, int] = {level: _channels(self.stage(level)) for level in LEVELS}

    def stem(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 64, H/4, W/4)."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return x

    def stage(self, level: Level) -> nn.Module:
        """The residual blocks that compute a level from the one before it."""
        module = getattr(self, _STAGES[level])
        assert isinstance(module, nn.Module)
        return module

    def after(self, last: Level) -> list[nn.Module]:
        """The stages that are not computed when `last` is the last level wanted."""
        return [self.stage(level) for level in LEVELS[LEVELS.index(last) + 1 :]]

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """Feature maps (N, C, H/stride, W/stride) of the wanted levels.

        images: (N, 3, H, W), normalised. last: levels after it are not computed.
        """
        features: dict[Level, Tensor] = {}
        x = self.stem(images)
        for level in LEVELS:
            stage = self.stage(level)
            if self.recompute and x.requires_grad:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            if level in levels:
                features[level] = x
            if level == last:
                break
        return features


class _FeatureInfo(Protocol):
    """What timm tells about the maps of a network cut into levels."""

    def reduction(self) -> list[int]: ...

    def channels(self) -> list[int]: ...


class _Checkpointing(Protocol):
    def set_grad_checkpointing(self, enable: bool) -> None: ...


class TimmBackbone(nn.Module):
    """Any timm network with `features_only`, its maps of stride 4 to 32 as res2 to res5."""

    def __init__(self, architecture: str) -> None:
        """architecture: timm:NAME. Raises UsageError, see `make_backbone`."""
        super().__init__()
        self.architecture = architecture
        name = architecture.removeprefix(TIMM)
        try:
            import timm
        except ImportError as error:
            raise UsageError(
                f"model.backbone: {architecture} needs timm; `pip install 'dupr-cli[timm]'`."
            ) from error
        if not timm.is_model(name):
            similar = timm.list_models(f"*{name[:6]}*")[:3]
            hint = f" Similar: {', '.join(similar)}." if similar else ""
            raise UsageError(f"model.backbone: timm {timm.__version__} has no {name}.{hint}")
        try:
            network = timm.create_model(name, pretrained=False, features_only=True)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UsageError(
                f"model.backbone: timm cannot cut {name} into levels (features_only): {error}"
            ) from error
        info = cast(_FeatureInfo, network.feature_info)
        strides, channels = info.reduction(), info.channels()
        missing = [s for s in LEVEL_STRIDES.values() if s not in strides]
        if missing:
            raise UsageError(
                f"model.backbone: the levels of timm's {name} have strides {strides}; "
                f"{missing} are missing. Networks with strides 4, 8, 16 and 32 can be used."
            )
        self.network = network
        self._positions = {level: strides.index(LEVEL_STRIDES[level]) for level in LEVELS}
        self.channels: dict[Level, int] = {v: channels[self._positions[v]] for v in LEVELS}

    @property
    def recompute(self) -> bool:
        """Whether levels are computed anew in the backward pass; timm does it by blocks."""
        return False

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted:
            try:
                cast(_Checkpointing, self.network).set_grad_checkpointing(True)
            except (AttributeError, AssertionError, NotImplementedError) as error:
                raise UsageError(
                    f"train.activation_checkpointing: timm's {self.architecture} has none"
                ) from error

    def after(self, last: Level) -> list[nn.Module]:
        """Nothing: timm computes every level."""
        return []

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """As `ResNetBackbone.forward`, but every level is computed whatever is wanted."""
        maps = self.network(images)
        return {level: maps[self._positions[level]] for level in LEVELS if level in levels}


def _channels(stage: nn.Module) -> int:
    """Channels that a stage puts out: those of its last convolution."""
    return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
