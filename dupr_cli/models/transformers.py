"""transformers' backbones: built from a configuration, with transformers' own tensor names.

NAME of `transformers:NAME` is one of the shapes below, or a configuration as JSON (recipes put the
content of a file there). Nothing is fetched.
Source of the shapes: the configurations of the published checkpoints (He et al. 2016; RT-DETR and
D-FINE of Zhao et al. 2024 and Peng et al. 2024; ConvNeXt of Liu et al. 2022; Swin of Liu et al.
2021), as transformers' classes take them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dupr_cli.errors import UsageError
from dupr_cli.models.library import LibraryBackbone, level_places
from dupr_cli.recipe.base import LEVELS, TRANSFORMERS, Level

_STEM = (3, 32, 48)  # HGNetV2's default: channels of the image, within and after the stem
# Pixels; every network takes images of this size.
_SIDE = 224

_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
_DEPTHS = {"18": [2, 2, 2, 2], "34": [3, 4, 6, 3], "50": [3, 4, 6, 3], "101": [3, 4, 23, 3]}


def _resnet(model_type: str, depth: str) -> dict[str, Any]:
    basic = _BASIC if depth in ("18", "34") else {}
    return {"model_type": model_type, "depths": _DEPTHS[depth], **basic}


def _hgnet(
    stem: int, mid: tuple[int, ...], out: tuple[int, ...], blocks: tuple[int, ...], layers: int,
    first: int, affine: bool,
) -> dict[str, Any]:  # fmt: skip
    """stem, first: channels within and after the stem. layers: of each block."""
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, stem, first],
        "stage_in_channels": [first, *out[:3]],
        "stage_mid_channels": list(mid),
        "stage_out_channels": list(out),
        "hidden_sizes": list(out),
        "stage_num_blocks": list(blocks),
        "stage_numb_of_layers": [layers] * 4,
        "use_learnable_affine_block": affine,
    }


def _convnext(depths: list[int], width: int) -> dict[str, Any]:
    widths = [width << stage for stage in range(4)]
    return {"model_type": "convnext", "depths": depths, "hidden_sizes": widths}


def _swin(depths: list[int], width: int) -> dict[str, Any]:
    heads = [width // 32 << stage for stage in range(4)]
    # Without stochastic depth, by which two views would differ.
    shape = {"depths": depths, "embed_dim": width, "num_heads": heads, "drop_path_rate": 0.0}
    return {"model_type": "swin", **shape}


_SHAPES: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}": _resnet("resnet", depth) for depth in _DEPTHS},
    **{f"rt_detr_resnet{depth}": _resnet("rt_detr_resnet", depth) for depth in _DEPTHS},
    "hgnetv2_b0": _hgnet(16, (16, 32, 64, 128), (64, 256, 512, 1024), (1, 1, 2, 1), 3, 16, True),
    "hgnetv2_b1": _hgnet(24, (32, 48, 96, 192), (64, 256, 512, 1024), (1, 1, 2, 1), 3, 32, True),
    "hgnetv2_b2": _hgnet(24, (32, 64, 128, 256), (96, 384, 768, 1536), (1, 1, 3, 1), 4, 32, True),
    "hgnetv2_b3": _hgnet(24, (32, 64, 128, 256), (128, 512, 1024, 2048), (1, 1, 3, 1), 5, 32, True),
    "hgnetv2_b4": _hgnet(
        32, (48, 96, 192, 384), (128, 512, 1024, 2048), (1, 1, 3, 1), 6, 48, False
    ),
    "hgnetv2_b5": _hgnet(
        32, (64, 128, 256, 512), (128, 512, 1024, 2048), (1, 2, 5, 2), 6, 64, False
    ),
    "convnext_tiny": _convnext([3, 3, 9, 3], 96),
    "convnext_small": _convnext([3, 3, 27, 3], 96),
    "convnext_base": _convnext([3, 3, 27, 3], 128),
    "convnext_large": _convnext([3, 3, 27, 3], 192),
    "swin_tiny": _swin([2, 2, 6, 2], 96),
    "swin_small": _swin([2, 2, 18, 2], 96),
    "swin_base": _swin([2, 2, 18, 2], 128),
}


class TransformersBackbone(LibraryBackbone):
    """A backbone class of transformers, with the maps of all levels as its outputs."""

    def __init__(self, architecture: str, in_channels: int = 3) -> None:
        """architecture: transformers:NAME or transformers:JSON. Raises UsageError, see
        `make_backbone`."""
        config = {**configuration(architecture), "num_channels": in_channels}
        if config["model_type"] == "hgnet_v2":  # which looks only here
            _, *stem = config.get("stem_channels", _STEM)
            config["stem_channels"] = [in_channels, *stem]
        stages, strides, channels = _maps(architecture)
        places = sorted(level_places(architecture, strides).values())
        chosen = [stages[place] for place in places]
        super().__init__(
            architecture,
            _built(architecture, {**config, "out_features": chosen}),
            [strides[place] for place in places],
            [channels[place] for place in places],
            in_channels,
        )
        self.config: dict[str, Any] = self.network.config.to_dict()

    def _recompute(self) -> None:
        self.network.gradient_checkpointing_enable()

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        """As `ResNetBackbone.forward`, but all levels are computed."""
        maps = dict(zip(self.levels, self.network(images).feature_maps, strict=True))
        return {v: maps[v] for v in self.levels if v in levels and v <= last}


def configuration(architecture: str) -> dict[str, Any]:
    """The configuration, with its `model_type`, that `transformers:NAME` stands for.

    Raises UsageError for an unknown name.
    """
    name = architecture.removeprefix(TRANSFORMERS)
    if name.startswith("{"):
        config: dict[str, Any] = json.loads(name)
        return config
    if name not in _SHAPES:
        near = get_close_matches(name, _SHAPES, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Named ones are {', '.join(_SHAPES)}."
        raise UsageError(
            f"model.backbone: {architecture} is not a backbone. {hint} Any other is given by the "
            f"path of its configuration: {TRANSFORMERS}PATH/config.json."
        )
    return _SHAPES[name]


def _built(architecture: str, config: dict[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"model.backbone: {architecture} needs transformers; "
            f"`pip install 'dupr-cli[transformers]'`."
        ) from error
    # The configuration classes raise many kinds of errors for values that do not fit.
    try:
        library: Any = transformers
        return library.AutoBackbone.from_config(library.AutoConfig.for_model(**config))
    except Exception as error:
        raise UsageError(
            f"model.backbone: transformers cannot build a backbone from {architecture}: {error}"
        ) from error


@cache
def _maps(architecture: str) -> tuple[list[str], list[int], list[int]]:
    """Names, strides and channels of all maps of a network, seen in a forward without values."""
    with torch.device("meta"):
        network = _built(architecture, configuration(architecture))
        names = list(network.config.stage_names)
        network = _built(architecture, {**configuration(architecture), "out_features": names})
        maps = network.eval()(torch.zeros(1, 3, _SIDE, _SIDE)).feature_maps
    return names, [_SIDE // int(m.shape[-1]) for m in maps], [int(m.shape[1]) for m in maps]
