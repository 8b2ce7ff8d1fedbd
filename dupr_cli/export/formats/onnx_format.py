"""ONNX: a network of four outputs, res2 to res5, for batches and images of any size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights, load_backbone
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import LibraryMissingError, Loaded
from dupr_cli.recipe.base import LEVELS

FILE = "backbone.onnx"
_OPSET = 18
_STRIDE = 32


class _Levels(nn.Module):
    def __init__(self, backbone: ResNetBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images, LEVELS)
        return tuple(features[level] for level in LEVELS)


class OnnxFormat:
    name = "onnx"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        if weights.tensors["conv1.weight"].dtype == torch.bfloat16:
            raise UsageError("--to onnx: onnxruntime computes no bfloat16; give another --dtype.")
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--to onnx needs {error.name}: pip install 'dupr-cli[onnx]'."
            ) from error
        backbone = ResNetBackbone(weights.metadata.architecture)
        load_backbone(backbone, weights)
        model = _Levels(backbone.to(weights.tensors["conv1.weight"].dtype)).eval()
        sizes = {
            0: torch.export.Dim("batch", min=1),
            2: torch.export.Dim("height", min=_STRIDE),
            3: torch.export.Dim("width", min=_STRIDE),
        }
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 96, 128, dtype=weights.tensors["conv1.weight"].dtype),),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=list(LEVELS),
            dynamic_shapes=(sizes,),
        )
        assert program is not None
        buffer = io.BytesIO()
        buffer.write(program.model_proto.SerializeToString())
        write_bytes(folder / FILE, buffer.getvalue())

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        try:
            import onnxruntime
        except ImportError as error:
            raise LibraryMissingError("onnxruntime") from error
        session = onnxruntime.InferenceSession(
            str(folder / FILE), providers=["CPUExecutionProvider"]
        )
        dtype = weights.tensors["conv1.weight"].dtype
        maps = session.run(list(LEVELS), {"images": images.to(dtype).numpy()})
        features = {level: torch.from_numpy(m) for level, m in zip(LEVELS, maps, strict=True)}
        return Loaded(features, f"onnxruntime {onnxruntime.__version__}")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        """Norms are folded into convolutions: only that the graph is whole can be said."""
        import onnx

        model = onnx.load(folder / FILE)
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.checker.ValidationError as error:
            raise RunError(f"{weights.address}: {FILE} is no valid graph: {error}") from error
        if [output.name for output in model.graph.output] != list(LEVELS):
            raise RunError(f"{weights.address}: {FILE} has other outputs than {', '.join(LEVELS)}")
        return dict(weights.tensors)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return [
            (
                "python",
                f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{place}{FILE}")
images = np.zeros((1, 3, 224, 224), dtype=np.float32)
res2, res3, res4, res5 = session.run(None, {{"images": images}})""",
            )
        ]
