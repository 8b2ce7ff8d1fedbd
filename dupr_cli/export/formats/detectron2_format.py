"""detectron2: a .pkl of plain arrays that its DetectionCheckpointer takes for R50-C4 and R50-FPN.

A pickle is the only thing that detectron2 reads natively besides torch's own. This one is written
from numpy arrays and strings, and holds nothing else; dupr never reads one. Names are those of the
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
from dupr_cli.export.formats import LibraryMissingError, Loaded
from dupr_cli.models.naming import detectron2_backbone_name

FILE = "backbone.pkl"
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
# All that a pickle of arrays asks for; by either name of numpy's module.
_ALLOWED = {
    "numpy._core.numeric _frombuffer", "numpy.core.numeric _frombuffer", "numpy ndarray",
    "numpy dtype", "numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct",
    "_codecs encode",
}  # fmt: skip


class Detectron2Format:
    name = "detectron2"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        if weights.metadata.architecture not in _DEPTHS:
            raise UsageError(
                f"--to detectron2: written for {', '.join(_DEPTHS)}, but the weights are of a "
                f"{weights.metadata.architecture}."
            )
        if weights.tensors["conv1.weight"].dtype == torch.bfloat16:
            raise UsageError("--to detectron2: numpy has no bfloat16; give another --dtype.")
        write_bytes(folder / FILE, _pickled(weights))

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        # It is not loaded even where detectron2 is installed: that would read a pickle.
        raise LibraryMissingError("no pickle is loaded, not even into detectron2")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        """The bytes must be those of the arrays, and name nothing but numpy's arrays."""
        data = (folder / FILE).read_bytes()
        if data != _pickled(weights):
            raise RunError(f"{weights.address}: {FILE} is not what was to be written")
        unknown = _asked_for(data) - _ALLOWED
        if unknown:
            raise RunError(f"{weights.address}: {FILE} asks for {', '.join(sorted(unknown))}")
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
    """Arrays by detectron2's names; it has no counters of batches."""
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
    # The first protocol with bytes, which every Python 3 reads; its imports are plain to see.
    return pickle.dumps(content, protocol=3)


def _asked_for(data: bytes) -> set[str]:
    """Modules and names that a pickle imports, found without loading it."""
    return {str(value) for op, value, _ in pickletools.genops(data) if op.name == "GLOBAL"}
