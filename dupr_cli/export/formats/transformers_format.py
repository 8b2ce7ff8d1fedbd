"""transformers: config.json, model.safetensors and preprocessor_config.json of a ResNetBackbone.

Source: transformers, models/resnet/modeling_resnet.py and configuration_resnet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import LibraryMissingError, Loaded
from dupr_cli.export.formats.safetensors_files import read_model, write_model
from dupr_cli.models.naming import block_count, transformers_name
from dupr_cli.recipe.base import LEVELS

_STAGES = [f"stage{n}" for n in range(1, 5)]


class TransformersFormat:
    name = "transformers"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        metadata = weights.metadata
        if metadata.architecture not in ("resnet18", "resnet34", "resnet50", "resnet101"):
            raise UsageError(
                f"--to transformers: its ResNets are resnet18, 34, 50 and 101 (no groups, no wider "
                f"bottlenecks), but the weights are of a {metadata.architecture}."
            )
        write_model(weights, folder, transformers_name, {})
        tensors = weights.tensors
        bottleneck = "layer1.0.conv3.weight" in tensors
        last = 3 if bottleneck else 2
        write_json(
            folder / "config.json",
            {
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
                "dtype": str(tensors["conv1.weight"].dtype).removeprefix("torch."),
            },
        )
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
            from transformers import ResNetBackbone
        except ImportError as error:
            raise LibraryMissingError("transformers is not installed") from error
        by = f"transformers {transformers.__version__}"
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: Any = ResNetBackbone.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=images.dtype
        )
        model, report = loaded
        problems = {kind: names for kind, names in report.items() if names}
        if problems:
            raise RunError(f"{by} does not load the weights unchanged: {problems}")
        maps = model.eval()(images).feature_maps
        return Loaded(dict(zip(LEVELS, maps, strict=True)), by)

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return read_model(weights, folder, transformers_name)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return [
            (
                "python",
                f"""import torch
from transformers import AutoImageProcessor, ResNetBackbone

backbone = ResNetBackbone.from_pretrained("{place or "."}")
processor = AutoImageProcessor.from_pretrained("{place or "."}")
features = backbone(torch.zeros(1, 3, 224, 224)).feature_maps""",
            ),
        ]
