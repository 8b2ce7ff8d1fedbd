"""MMDetection: a checkpoint for `init_cfg=dict(type="Pretrained", prefix="backbone.")`.

MMDetection's ResNets (style="pytorch") have torchvision's names; here they are prefixed with
`backbone.`, as in a detector's checkpoint. mmengine reads only files of torch.save.
Source: mmdet/models/backbones/resnet.py; mmengine/runner/checkpoint.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import LibraryMissingError, Loaded, require_rgb
from dupr_cli.export.formats.safetensors_files import load_strictly, renamed_back
from dupr_cli.recipe.base import LEVELS

FILE = "backbone.pth"
_PREFIX = "backbone."
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}


def _depth(weights: Weights) -> int:
    architecture = weights.metadata.architecture
    if architecture not in _DEPTHS:
        raise UsageError(
            f"--to mmdetection: it supports {', '.join(_DEPTHS)}, but the weights are of a "
            f"{architecture}."
        )
    return _DEPTHS[architecture]


class MMDetectionFormat:
    name = "mmdetection"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        require_rgb(weights, self.name)
        _depth(weights)
        tensors = {_PREFIX + name: tensor for name, tensor in weights.tensors.items()}
        buffer = io.BytesIO()
        torch.save({"state_dict": tensors, "meta": weights.metadata.to_header()}, buffer)
        write_bytes(folder / FILE, buffer.getvalue())

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        try:
            import mmdet
            from mmdet.models.backbones import ResNet
        except ImportError as error:
            raise LibraryMissingError("mmdet is not installed") from error
        model = ResNet(depth=_depth(weights), norm_eval=False, frozen_stages=-1)
        load_strictly(model, self.tensors(weights, folder), "mmdet")
        maps = model.eval()(images)
        return Loaded(dict(zip(LEVELS, maps, strict=True)), f"mmdet {mmdet.__version__}")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        content = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        found = content["state_dict"]
        if not all(name.startswith(_PREFIX) for name in found):
            raise RunError(f"{weights.address}: some tensors of {FILE} lack the prefix {_PREFIX}")
        return renamed_back(weights, found, lambda name: _PREFIX + name)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        mean, std = weights.metadata.pixel_statistics
        return [
            (
                "python",
                f"""model = dict(
    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True),
    backbone=dict(
        type="ResNet",
        depth={_depth(weights)},
        style="pytorch",
        frozen_stages=-1,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint="{place}{FILE}", prefix="{_PREFIX}"),
    ),
)""",
            )
        ]
