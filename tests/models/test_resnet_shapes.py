"""Names and shapes of torchvision's ResNets, against the networks that torchvision builds."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.models.resnet_shapes import is_torchvision, resnet_shapes
from dupr_cli.recipe.base import Backbone


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("architecture", get_args(Backbone))
def test_shapes_are_those_of_torchvision(architecture: str, channels: int) -> None:
    with torch.device("meta"):
        state = ResNetBackbone(architecture, channels).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert list(resnet_shapes(architecture, channels).items()) == list(shapes.items())


def test_only_torchvisions_names_are_torchvisions() -> None:
    assert is_torchvision("resnet50")
    assert not is_torchvision("timm:resnet50")
