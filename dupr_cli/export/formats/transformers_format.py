"""transformers: config.json, model.safetensors and preprocessor_config.json of a backbone.

A backbone of transformers keeps its names. torchvision's ResNets, timm's HGNetV2 and timm's deeper
ResNet-D are written as the classes of transformers that have the same tensors.
Source: transformers, models/resnet, models/rt_detr and models/hgnet_v2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import HubFolder, LibraryMissingError, Loaded, require_rgb
from dupr_cli.export.formats.safetensors_files import read_model, write_model
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.naming import block_count, names_elsewhere
from dupr_cli.models.transformers import TransformersBackbone
from dupr_cli.recipe.base import TIMM, TRANSFORMERS

_CONFIG = "config.json"
_STAGES = [f"stage{n}" for n in range(1, 5)]
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def transformers_twin(weights: Weights) -> str | None:
    """The backbone of transformers that has the same tensors, if there is one."""
    architecture = weights.metadata.architecture
    if architecture.startswith(TRANSFORMERS):
        return architecture
    if weights.metadata.layout == "torchvision":
        return TRANSFORMERS + architecture if architecture in _RESNETS else None
    if "transformers" not in names_elsewhere(architecture, weights.tensors):
        return None
    plain = architecture.removeprefix(TIMM).partition(".")[0]
    return TRANSFORMERS + (plain if plain.startswith("hgnet") else f"rt_detr_{plain[:-1]}")


def names_in(library: str, weights: Weights) -> Mapping[str, str]:
    """The names of the weights' tensors in a library that has them."""
    return names_elsewhere(weights.metadata.architecture, weights.tensors)[library]


class TransformersFormat:
    name = "transformers"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        require_rgb(weights, self.name)
        metadata = weights.metadata
        twin = transformers_twin(weights)
        if twin is None:
            raise UsageError(
                f"--to {self.name}: transformers has no network of the tensors of a "
                f"{metadata.architecture}; those are its own backbones, {', '.join(_RESNETS)}, and "
                f"timm's hgnetv2, resnet50d and resnet101d."
            )
        # With its header, a file in our own names is also a weights file of dupr.
        header = metadata.to_header() if metadata.layout == "transformers" else {}
        write_model(weights, folder, names_in("transformers", weights).__getitem__, header)
        dtype = str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
        write_json(folder / _CONFIG, {**_config(weights, twin), "dtype": dtype})
        size = max(224, metadata.input_size)
        write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "ConvNextImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": size},
                "crop_pct": 0.875,
                "resample": 3,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(metadata.input_mean),
                "image_std": list(metadata.input_std),
            },
        )

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        try:
            import transformers
        except ImportError as error:
            raise LibraryMissingError("transformers is not installed") from error
        by = f"transformers {transformers.__version__}"
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: Any = getattr(transformers, _class(folder)).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=images.dtype
        )
        model, report = loaded
        problems = {kind: names for kind, names in report.items() if names}
        if problems:
            raise RunError(f"{by} does not load the weights unchanged: {problems}")
        maps = model.eval()(images).feature_maps
        levels = as_backbone(make_backbone(weights.metadata.architecture)).levels
        return Loaded(dict(zip(levels, maps, strict=True)), by)

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return read_model(weights, folder, names_in("transformers", weights).__getitem__)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return _blocks(weights, f'"{place or "."}"')

    def hub_usage(self, weights: Weights, hub: HubFolder) -> Sequence[tuple[str, str]]:
        options = {"subfolder": hub.folder.rstrip("/"), "revision": hub.revision}
        given = [f'{name}="{value}"' for name, value in options.items() if value]
        return _blocks(weights, ", ".join([f'"{hub.repository}"', *given]))


def _blocks(weights: Weights, source: str) -> Sequence[tuple[str, str]]:
    """source: the arguments of `from_pretrained`, as code."""
    twin = transformers_twin(weights)
    assert twin is not None  # it was written
    (used,) = _config(weights, twin)["architectures"]
    return [
        (
            "python",
            f"""import torch
from transformers import AutoImageProcessor, {used}

backbone = {used}.from_pretrained({source})
processor = AutoImageProcessor.from_pretrained({source})
features = backbone(torch.zeros(1, 3, 224, 224)).feature_maps""",
        ),
    ]


def _class(folder: Path) -> str:
    """The class of transformers that config.json names; transformers 5 finds none for a folder."""
    (name,) = json.loads((folder / _CONFIG).read_bytes())["architectures"]
    return str(name)


def _config(weights: Weights, twin: str) -> dict[str, Any]:
    """config.json without the type of the numbers. twin: see `transformers_twin`."""
    if weights.metadata.layout == "torchvision":
        return _resnet_config(weights.tensors)
    backbone = TransformersBackbone(twin)
    return {**backbone.config, "architectures": [type(backbone.network).__name__]}


def _resnet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As `ResNetConfig` has it; transformers need not be installed."""
    bottleneck = "layer1.0.conv3.weight" in tensors
    last = 3 if bottleneck else 2
    return {
        "architectures": ["ResNetBackbone"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [
            int(tensors[f"layer{n}.0.conv{last}.weight"].shape[0]) for n in range(1, 5)
        ],
        "depths": [block_count(tensors, n) for n in range(1, 5)],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": _STAGES,
        "out_indices": [1, 2, 3, 4],
        "stage_names": ["stem", *_STAGES],
    }
