"""torchvision's ResNets as backbones: state-dict names are torchvision's own, without fc."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dupr_cli.errors import UsageError
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.base import Backbone as TorchvisionName

_STAGES: dict[Level, str] = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


class ResNetBackbone(nn.Module):
    """conv1 to layer4 of a torchvision ResNet, ResNeXt or wide ResNet.

    Source: He et al. 2016, with the stride in the 3x3 convolution, as in torchvision.
    """

    levels = LEVELS

    def __init__(self, architecture: str, in_channels: int = 3) -> None:
        """Raises UsageError unless the architecture is one of torchvision's ResNets."""
        super().__init__()
        if architecture not in get_args(TorchvisionName):
            raise UsageError(
                f"{architecture} is not a torchvision ResNet; those are "
                f"{', '.join(get_args(TorchvisionName))}."
            )
        # Here, because torchvision also loads torch's compiler, which no dry run needs.
        import torchvision

        self.architecture, self.in_channels = architecture, in_channels
        self.recompute = False
        network = torchvision.models.get_model(architecture, weights=None)
        self.conv1: nn.Module = network.conv1 if in_channels == 3 else _stem(in_channels)
        self.bn1: nn.Module = network.bn1
        self.relu: nn.Module = network.relu
        self.maxpool: nn.Module = network.maxpool
        for stage in _STAGES.values():
            setattr(self, stage, getattr(network, stage))
        self.channels: dict[Level, int] = {level: _channels(self.stage(level)) for level in LEVELS}
        self.strides = dict(LEVEL_STRIDES)
        # Every convolution and pooling of stride 2 is padded so that cell 0 is centred on pixel 0.
        self.first_centres: dict[Level, float] = dict.fromkeys(LEVELS, 0.5)

    def stem(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 64, H/4, W/4)."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return x

    def stage(self, level: Level) -> nn.Module:
        """The residual blocks that compute a level from the previous one."""
        module = getattr(self, _STAGES[level])
        assert isinstance(module, nn.Module)
        return module

    def after(self, last: Level) -> list[nn.Module]:
        """The stages that need not be computed when `last` is the last level wanted."""
        return [self.stage(level) for level in LEVELS[LEVELS.index(last) + 1 :]]

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are: the names have always been torchvision's."""
        return dict(tensors)

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """Feature maps (N, C, H/stride, W/stride) of the wanted levels.

        images: (N, C, H, W), normalised. last: later levels are not computed.
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


def _stem(channels: int) -> nn.Module:
    """The first convolution for images of `channels` channels, initialised as torchvision's."""
    stem = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _channels(stage: nn.Module) -> int:
    """Output channels of a stage: those of its last convolution."""
    return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
