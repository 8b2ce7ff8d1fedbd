"""Measures on a backbone what its library does not tell: where cells lie, what a level needs.

RoIAlign, and every detector, takes cell i to be centred at (i + 1/2) strides. Padded convolutions
of stride 2 see one pixel further to the left than to the right, and in a ResNet their shifts add up
to (stride - 1) / 2. A network that is made of patches, such as ConvNeXt, has no shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dupr_cli.recipe.base import Level

# Pixels. The part of the receptive field that matters fits into the first at a stride of 32; the
# second is for networks of fixed size.
_SIZES = (384, 224)


def unused_modules(backbone: nn.Module, last: Level) -> list[nn.Module]:
    """The modules none of whose parameters acts on a `Backbone`'s level `last` or earlier ones.

    Which they are is seen in a backward pass; the backbone is left as it was.
    """
    was_training = backbone.training
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    parameters = list(backbone.requires_grad_(True).eval().parameters())
    # A level's map may be computed beside the later ones, so earlier levels are asked for too.
    levels = [v for v in cast("Sequence[Level]", backbone.levels) if v <= last]
    device, side = parameters[0].device, _SIZES[-1]
    try:
        with torch.enable_grad():
            channels = cast("int", backbone.in_channels)
            maps = backbone(torch.zeros(1, channels, side, side, device=device), levels, last)
            total = torch.stack([features.sum() for features in maps.values()]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        backbone.train(was_training)
        for parameter in frozen:
            parameter.requires_grad_(False)
    used = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
    return [
        module
        for module in backbone.modules()
        if (within := list(module.parameters())) and not any(id(p) in used for p in within)
    ]


def measured_first_centres(make: Callable[[], nn.Module]) -> dict[Level, float]:
    """Pixels from the image's left edge to the centre of the first cell, by level.

    make: creates a `Backbone`. Its random weights come from a fixed seed, so that the result
    belongs to the architecture. The energy of the gradient of the cells in the middle of the map,
    weighted at random, is centred where these cells are centred on average. Random weights leave an
    error of about a twentieth of a stride.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        backbone = make().eval().requires_grad_(False)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Some start residual branches at zero, where only the shortcuts would be measured.
                nn.init.ones_(module.weight)
        for size in _SIZES:
            try:
                return _measured(backbone, size)
            except (AssertionError, RuntimeError):  # it takes images of another size only
                continue
    strides = cast("dict[Level, int]", backbone.strides)
    return {level: stride / 2 for level, stride in strides.items()}


def _measured(backbone: nn.Module, size: int) -> dict[Level, float]:
    images = torch.randn(1, 3, size, size).requires_grad_()
    found: dict[Level, float] = {}
    places = torch.arange(size) + 0.5
    with torch.enable_grad():
        features: dict[Level, Tensor] = backbone(images)
        for level, stride in cast("dict[Level, int]", backbone.strides).items():
            cells = features[level].shape[3]
            first, end = cells // 3, cells - cells // 3
            middle = features[level][:, :, first:end, first:end]
            total = (middle * torch.randn(middle.shape)).sum()
            (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
            energy = gradient.double().square().sum((0, 1))  # (H, W)
            lines = energy.sum(0) + energy.sum(1)
            centre = float((lines * places).sum() / lines.sum())
            found[level] = centre - stride * (first + end - 1) / 2
    return found
