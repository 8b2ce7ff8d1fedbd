"""timm: model.safetensors and config.json, as `timm.create_model` loads them from folder or Hub.

timm's ResNets have torchvision's names, and networks of timm's have their own. Some of those have
layers after the last level, which pre-training does not see; timm loads no file without them, so
they are written with random values, and the header of the file names them.
Source: timm, models/_hub.py, models/_builder.py and models/resnet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import HubFolder, LibraryMissingError, Loaded
from dupr_cli.export.formats.safetensors_files import read_model, write_model
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.timm import TimmBackbone
from dupr_cli.recipe.base import TIMM
from dupr_cli.recipe.pretrain import DUPR

_PAPER = {
    "paper_name": "Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors",
    "paper_ids": "arXiv:2103.04814",
}


class TimmFormat:
    name = "timm"
    top = True

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        metadata = weights.metadata
        if metadata.layout not in ("torchvision", self.name):
            raise UsageError(
                f"--to timm: the weights are of a {metadata.architecture}, whose names in timm are "
                f"not known. Give --to {metadata.layout}."
            )
        if metadata.layout == "torchvision":
            further: dict[str, Tensor] = {}
            known: dict[str, Any] = {"first_conv": "conv1", "classifier": "fc"}
        else:
            further, known = _layers_after(weights), dict(_in_timm(weights).network.pretrained_cfg)
        channels = metadata.input.channels
        backbone = as_backbone(make_backbone(metadata.architecture))
        whole = replace(weights, tensors={**weights.tensors, **further})
        # With its header this is also a weights file of dupr.
        header = replace(metadata, further=tuple(sorted(further))).to_header()
        write_model(whole, folder, _same, header)
        size = max(224, metadata.input_size)
        write_json(
            folder / "config.json",
            {
                "architecture": metadata.architecture.removeprefix(TIMM),
                "num_classes": 0,
                "num_features": backbone.channels[backbone.levels[-1]],
                **({"model_args": {"in_chans": channels}} if channels != 3 else {}),
                "pretrained_cfg": {
                    "tag": "dupr",
                    "license": license_name,
                    "custom_load": False,
                    "input_size": [channels, size, size],
                    "fixed_input_size": known.get("fixed_input_size", False),
                    "interpolation": "bicubic",
                    "crop_pct": 0.875,
                    "crop_mode": "center",
                    "mean": list(metadata.input_mean),
                    "std": list(metadata.input_std),
                    "num_classes": 0,
                    "pool_size": [size // 32, size // 32],
                    # timm adapts the named convolution to another number of channels, which this
                    # one already has.
                    "first_conv": known["first_conv"] if channels == 3 else None,
                    "classifier": known["classifier"],
                    **(_PAPER if metadata.method == DUPR else {}),
                },
            },
        )

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        try:
            import timm
        except ImportError as error:
            raise LibraryMissingError("timm is not installed") from error
        by = f"timm {timm.__version__}"
        address = f"local-dir:{folder}"
        ours = _in_timm(weights)
        try:
            # Load both forms, because a detector uses a backbone of features.
            whole: Any = timm.create_model(address, pretrained=True, **ours.options).eval()
            levels = timm.create_model(
                address,
                pretrained=True,
                features_only=True,
                feature_cls="getter",
                out_indices=ours.out_indices,
                **ours.options,
            ).eval()
        except RuntimeError as error:
            raise RunError(f"{by} refuses the weights: {error}") from error
        features = dict(zip(ours.levels, levels(images), strict=True))
        # The last level comes from the whole model, whose weights are loaded separately.
        (last,) = whole.forward_intermediates(
            images, indices=ours.out_indices[-1:], norm=False, intermediates_only=True
        )
        return Loaded({**features, ours.levels[-1]: last}, by)

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return read_model(weights, folder, _same)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return _blocks(weights, f"local-dir:{place or '.'}")

    def hub_usage(self, weights: Weights, hub: HubFolder) -> Sequence[tuple[str, str]]:
        revision = f"@{hub.revision}" if hub.revision else ""
        return _blocks(weights, f"hf-hub:{hub.repository}{revision}")


def _blocks(weights: Weights, address: str) -> Sequence[tuple[str, str]]:
    channels = weights.metadata.input.channels
    if weights.metadata.layout == "torchvision":
        return [
            (
                "python",
                f"""import timm
import torch

model = timm.create_model("{address}", pretrained=True)
levels = timm.create_model("{address}", pretrained=True, features_only=True)
features = levels(torch.zeros(1, {channels}, 224, 224))""",
            )
        ]
    ours = _in_timm(weights)
    options = "".join(f", {name}={value}" for name, value in ours.options.items())
    names = ", ".join(ours.levels) + ("," if len(ours.levels) == 1 else "")
    return [
        (
            "python",
            f"""import timm
import torch

levels = timm.create_model(
    "{address}", pretrained=True, features_only=True, feature_cls="getter",
    out_indices={ours.out_indices}{options},
)
{names} = levels(torch.zeros(1, {channels}, 224, 224))""",
        )
    ]


def _in_timm(weights: Weights) -> TimmBackbone:
    """The network as timm has it."""
    metadata = weights.metadata
    name = TIMM + metadata.architecture.removeprefix(TIMM)
    return TimmBackbone(name, metadata.input.channels)


def _layers_after(weights: Weights) -> dict[str, Tensor]:
    """The tensors of the layers that timm has after the last level, with fixed random values."""
    import timm

    name = weights.metadata.architecture.removeprefix(TIMM)
    dtype = next(t.dtype for t in weights.tensors.values() if t.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = timm.create_model(
            name, pretrained=False, num_classes=0, in_chans=weights.metadata.input.channels
        ).state_dict()
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in whole.items()
        if key not in weights.tensors
    }


def _same(name: str) -> str:
    return name
