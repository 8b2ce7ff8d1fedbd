"""timm: model.safetensors and config.json, as `timm.create_model` loads them from folder or Hub.

timm's ResNets have torchvision's names. Source: timm, models/_hub.py and models/resnet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError
from dupr_cli.export.formats import LibraryMissingError, Loaded
from dupr_cli.export.formats.safetensors_files import read_model, write_model
from dupr_cli.recipe.base import LEVELS
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
        # The names are torchvision's, so with its header this is also a weights file of dupr.
        write_model(weights, folder, _same, metadata.to_header())
        size = max(224, metadata.input_size)
        write_json(
            folder / "config.json",
            {
                "architecture": metadata.architecture,
                "num_classes": 0,
                "num_features": len(weights.tensors["layer4.0.downsample.0.weight"]),
                "pretrained_cfg": {
                    "tag": "dupr",
                    "license": license_name,
                    "custom_load": False,
                    "input_size": [3, size, size],
                    "fixed_input_size": False,
                    "interpolation": "bicubic",
                    "crop_pct": 0.875,
                    "crop_mode": "center",
                    "mean": list(metadata.input_mean),
                    "std": list(metadata.input_std),
                    "num_classes": 0,
                    "pool_size": [size // 32, size // 32],
                    "first_conv": "conv1",
                    "classifier": "fc",
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
        try:
            # Load both forms, because a detector uses a backbone of features.
            whole: Any = timm.create_model(address, pretrained=True).eval()
            levels = timm.create_model(
                address, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)
            ).eval()
        except RuntimeError as error:
            raise RunError(f"{by} refuses the weights: {error}") from error
        features = dict(zip(LEVELS, levels(images), strict=True))
        # The last level comes from the whole model, whose weights are loaded separately.
        return Loaded({**features, "res5": whole.forward_features(images)}, by)

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return read_model(weights, folder, _same)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return [
            (
                "python",
                f"""import timm
import torch

model = timm.create_model("local-dir:{place or "."}", pretrained=True)
levels = timm.create_model("local-dir:{place or "."}", pretrained=True, features_only=True)
features = levels(torch.zeros(1, 3, 224, 224))""",
            )
        ]


def _same(name: str) -> str:
    return name
