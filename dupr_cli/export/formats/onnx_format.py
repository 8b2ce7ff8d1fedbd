"""ONNX: a network with four outputs, res2 to res5, for batches and images of any size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import Loaded
from dupr_cli.models.backbone import as_backbone, load_backbone, make_backbone
from dupr_cli.recipe.base import Level

FILE = "backbone.onnx"
_OPSET = 18
_STRIDE = 32
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class _Maps(nn.Module):
    """A backbone's maps as a tuple, in the order of its levels."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


class OnnxFormat:
    name = "onnx"
    top = False

    def __init__(self) -> None:
        """Raises UsageError if a library that writes or checks the graph is not installed."""
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise UsageError(f"--to onnx needs {', '.join(missing)}: pip install 'dupr-cli[onnx]'.")

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        dtype = _dtype(weights)
        if dtype == torch.bfloat16:
            raise UsageError("--to onnx: onnxruntime lacks bfloat16; give another --dtype.")
        channels = weights.metadata.input.channels
        backbone = make_backbone(weights.metadata.architecture, channels)
        load_backbone(backbone, weights)
        model = _Maps(backbone.to(dtype)).eval()
        sizes = {
            0: torch.export.Dim("batch", min=1),
            2: torch.export.Dim("height", min=_STRIDE),
            3: torch.export.Dim("width", min=_STRIDE),
        }
        program = torch.onnx.export(
            model,
            (torch.zeros(2, channels, 96, 128, dtype=dtype),),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=list(as_backbone(backbone).levels),
            dynamic_shapes=(sizes,),
        )
        assert program is not None
        buffer = io.BytesIO()
        buffer.write(program.model_proto.SerializeToString())
        write_bytes(folder / FILE, buffer.getvalue())

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            str(folder / FILE), providers=["CPUExecutionProvider"]
        )
        levels = [cast(Level, output.name) for output in session.get_outputs()]
        maps = session.run(levels, {"images": images.to(_dtype(weights)).numpy()})
        features = {level: torch.from_numpy(m) for level, m in zip(levels, maps, strict=True)}
        return Loaded(features, f"onnxruntime {onnxruntime.__version__}")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        """Always raises: norms are folded into convolutions. `load` does the checking."""
        raise RunError(f"{weights.address}: {FILE} holds no tensors by the backbone's names")

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        metadata = weights.metadata
        levels = as_backbone(make_backbone(metadata.architecture)).levels
        return [
            (
                "python",
                f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{place}{FILE}")
images = np.zeros((1, {metadata.input.channels}, 224, 224), dtype=np.float32)
{", ".join(levels)} = session.run(None, {{"images": images}})""",
            )
        ]


def _dtype(weights: Weights) -> torch.dtype:
    return next(t.dtype for t in weights.tensors.values() if t.is_floating_point())
