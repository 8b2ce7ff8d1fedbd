"""Names of a ResNet's tensors in other frameworks, from torchvision's."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_NORM = re.compile(r"bn(\d)\.(.+)")


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
