"""Dilates res5, so that its map has the stride of res4: dense predictions need more cells.

The layers of res5 that halve the map no longer do, and all later ones are dilated by 2. Each
cell that the map had before keeps its value, and new ones come between them ("a trous"); tensors
keep their names and shapes. With torchvision's ResNets this is `replace_stride_with_dilation`, and
it also serves its ResNet-18 and 34, which that option refuses. Source: Chen et al. 2015 (DeepLab).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.models.backbone import as_backbone
from dupr_cli.recipe.base import LEVELS

# Pixels of the image on which a dilated network is compared with the original.
_SIDE = 128
_TOLERANCE = 1e-3


class _DensePool(nn.AvgPool2d):
    """Means of 2 x 2 cells at every cell, as in the shortcuts of ResNet-D."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(input, (0, 1, 0, 1), mode="replicate"), 2, 1)


def dilate(backbone: nn.Module) -> bool:
    """Dilate res5 of a `Backbone` in place. False, and nothing is changed, if the network cannot
    be dilated: a comparison of the maps decides, not its name."""
    if not {"res4", "res5"} <= set(as_backbone(backbone).levels):
        return False
    tried = copy.deepcopy(backbone).to("cpu", torch.float32).eval().requires_grad_(False)
    for module in tried.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Some start residual branches at zero, which would hide them from the comparison.
            nn.init.ones_(module.weight)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        images = torch.randn(1, as_backbone(backbone).in_channels, _SIDE, _SIDE)
        before = _res5(tried, images)
        changes = _changes(tried, images)
        _apply(tried, changes)
        try:
            after = _res5(tried, images)
        except (RuntimeError, AssertionError):  # branches of different sizes
            return False
    if after.shape[2:] != tuple(2 * side for side in before.shape[2:]):
        return False
    if not torch.allclose(
        after[:, :, ::2, ::2], before, atol=_TOLERANCE * float(before.abs().max())
    ):
        return False
    _apply(backbone, changes)
    strides = as_backbone(backbone).strides
    strides["res5"] = strides["res4"]
    return True


def _res5(backbone: nn.Module, images: Tensor) -> Tensor:
    return as_backbone(backbone)(images, LEVELS[-1:])["res5"]


def _changes(backbone: nn.Module, images: Tensor) -> dict[str, bool]:
    """Layers of res5 to change, by name: to lose their stride, or else to be dilated."""
    within = {id(m) for part in as_backbone(backbone).after("res4") for m in part.modules()}
    names = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d | nn.AvgPool2d) and id(module) in within
    }
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in names.items()
    ]
    _res5(backbone, images)
    for hook in hooks:
        hook.remove()
    changes: dict[str, bool] = {}
    for name in called:
        strided = names[name].stride not in (1, (1, 1))
        if strided or changes:
            changes[name] = strided
    return changes


def _apply(backbone: nn.Module, changes: dict[str, bool]) -> None:
    for name, strided in changes.items():
        module = backbone.get_submodule(name)
        if isinstance(module, nn.AvgPool2d):
            if strided:
                module.__class__ = _DensePool
        elif isinstance(module, nn.Conv2d):
            if strided:
                module.stride = (1, 1)
            elif max(module.kernel_size) > 1:
                module.dilation = tuple(2 * side for side in module.dilation)
                if not isinstance(module.padding, str):  # otherwise it follows the dilation
                    module.padding = tuple(2 * side for side in module.padding)
