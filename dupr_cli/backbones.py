"""Backbones: torchvision ResNets as feature extractors over levels res2..res5.

Used by every stage that touches a network. State-dict names are torchvision's own, without fc, so
that weights move between stages and to other tools without renaming.
"""

from __future__ import annotations

from collections.abc import Collection

import torchvision
from torch import Tensor, nn

from dupr_cli.recipe.base import LEVELS, Level

_STAGES: dict[Level, str] = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


class ResNetBackbone(nn.Module):
    """conv1 to layer4 of a torchvision ResNet.

    Source: He et al. 2016, with the stride in the 3x3 convolution as torchvision has it.
    """

    def __init__(self, architecture: str) -> None:
        """Raises ValueError for a name that torchvision does not know."""
        super().__init__()
        self.architecture = architecture
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

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """Feature maps (N, C, H/stride, W/stride) of the wanted levels.

        images: (N, 3, H, W), normalised. last: levels after it are not computed.
        """
        features: dict[Level, Tensor] = {}
        x = self.stem(images)
        for level in LEVELS:
            x = self.stage(level)(x)
            if level in levels:
                features[level] = x
            if level == last:
                break
        return features


def _channels(stage: nn.Module) -> int:
    """Channels that a stage puts out: those of its last convolution."""
    return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
