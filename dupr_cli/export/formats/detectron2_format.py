"""detectron2: a .pkl of plain arrays that its DetectionCheckpointer loads for R50-C4 and R50-FPN.

Besides torch's own files, detectron2 reads only pickles natively. This one is written from numpy
arrays and strings, and holds nothing else; dupr never reads one. Names are those of the
bare ResNet: detectron2 matches them with `backbone.` and `backbone.bottom_up.` by itself
(matching_heuristics), and with `roi_heads.res5` in C4.
Source: detectron2, modeling/backbone/resnet.py and checkpoint/detection_checkpoint.py.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dupr_cli.artifacts.files import write_bytes
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import LibraryMissingError, Loaded, require_rgb
from dupr_cli.models.naming import detectron2_backbone_name

FILE = "backbone.pkl"
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
# All imports that a pickle of arrays needs; numpy's module has either of two names.
_ALLOWED = {
    "numpy._core.numeric _frombuffer", "numpy.core.numeric _frombuffer", "numpy ndarray",
    "numpy dtype", "numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct",
    "_codecs encode",
}  # fmt: skip


class Detectron2Format:
    name = "detectron2"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        require_rgb(weights, self.name)
        if weights.metadata.architecture not in _DEPTHS:
            raise UsageError(
                f"--to detectron2: it supports {', '.join(_DEPTHS)}, but the weights are of a "
                f"{weights.metadata.architecture}."
            )
        if weights.tensors["conv1.weight"].dtype == torch.bfloat16:
            raise UsageError("--to detectron2: numpy has no bfloat16; give another --dtype.")
        write_bytes(folder / FILE, _pickled(weights))

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        # It is not loaded even if detectron2 is installed, because that would read a pickle.
        raise LibraryMissingError("dupr never loads a pickle")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        """Check that the bytes are those of the arrays, and name nothing but numpy's arrays."""
        data = (folder / FILE).read_bytes()
        if data != _pickled(weights):
            raise RunError(f"{weights.address}: {FILE} differs from the intended content")
        unknown = _asked_for(data) - _ALLOWED
        if unknown:
            raise RunError(f"{weights.address}: {FILE} imports {', '.join(sorted(unknown))}")
        return dict(weights.tensors)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        metadata = weights.metadata
        mean, std = metadata.pixel_statistics
        return [
            (
                "yaml",
                f"""MODEL:
  WEIGHTS: "{place}{FILE}"
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {_DEPTHS[metadata.architecture]}
    NORM: "SyncBN"
    STRIDE_IN_1X1: False
  FPN:
    NORM: "SyncBN"
INPUT:
  FORMAT: "RGB\"""",
            )
        ]


def detectron2_arrays(weights: Weights) -> dict[str, np.ndarray]:
    """Arrays by detectron2's names, which have no batch counters."""
    return {
        detectron2_backbone_name(name): tensor.numpy()
        for name, tensor in weights.tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def _pickled(weights: Weights) -> bytes:
    content = {
        "model": detectron2_arrays(weights),
        "__author__": "dupr",
        "matching_heuristics": True,
    }
    # This is the first protocol with bytes, which every Python 3 reads; its imports are visible.
    return pickle.dumps(content, protocol=3)


def _asked_for(data: bytes) -> set[str]:
    """Modules and names that a pickle imports, found without loading it."""
    return {str(value) for op, value, _ in pickletools.genops(data) if op.name == "GLOBAL"}
