"""Conversion of torchvision's ResNet tensor names to those of other frameworks."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_NORM = re.compile(r"bn(\d)\.(.+)")
_PART = re.compile(r"(conv|bn)(\d)\.(.+)")
_KINDS = {"conv": "convolution", "bn": "normalization"}


def block_count(names: Iterable[str], stage: int) -> int:
    """Residual blocks of layer1 to layer4 among the names of a ResNet's tensors."""
    return sum(
        re.fullmatch(rf"layer{stage}\.\d+\.conv1\.weight", name) is not None for name in names
    )


def detectron2_backbone_name(name: str) -> str:
    """`layer3.0.bn1.weight` to `res4.0.conv1.norm.weight`, `conv1.weight` to `stem.conv1.weight`.

    Source: detectron2, modeling/backbone/resnet.py: norms belong to their convolutions, a block's
    projection is its shortcut, and stages count from res2.
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        return "stem." + _norms_renamed(name)
    stage, number, rest = int(block[1]) + 1, block[2], block[3]
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"res{stage}.{number}." + _norms_renamed(rest)


def _norms_renamed(name: str) -> str:
    return _NORM.sub(r"conv\1.norm.\2", name)


def transformers_name(name: str) -> str:
    """`layer1.0.conv2.weight` to `encoder.stages.0.layers.0.layer.1.convolution.weight`.

    Source: transformers, models/resnet/modeling_resnet.py.
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        return re.sub(_PART, lambda part: f"embedder.embedder.{_KINDS[part[1]]}.{part[3]}", name)
    stage = f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}"
    rest = block[3].replace("downsample.0.", "shortcut.convolution.")
    rest = rest.replace("downsample.1.", "shortcut.normalization.")
    return f"{stage}." + _PART.sub(
        lambda part: f"layer.{int(part[2]) - 1}.{_KINDS[part[1]]}.{part[3]}", rest
    )
