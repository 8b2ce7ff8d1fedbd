"""Verification: the files, loaded into their framework, compute the same features as dupr.

If the framework is not installed, names, shapes and values of the tensors are compared instead, and
the result says so. In both cases a file is compared before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import RunError
from dupr_cli.export.formats import ExportFormat, Features, LibraryMissingError
from dupr_cli.models.backbone import load_backbone, make_backbone

# Relative to the largest value of a level. The same operations in another order differ by rounding;
# a framework that computes in reduced precision (ONNX of such weights) rounds at every layer.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Deep networks with values that grow from block to block round more than this even in float32.
_TIMES_OWN_ROUNDING = 4


@dataclass(frozen=True)
class Verification:
    """max_difference: of features, relative to the largest of their level; 0 for tensors, which
    must be equal. by: the library that loaded them.
    """

    max_difference: float
    by: str
    features_compared: bool


@torch.no_grad()
def verify(written: ExportFormat, weights: Weights, folder: Path) -> Verification:
    """Raises RunError, with the largest difference, when the files are not the same network."""
    images = fixed_images(weights.metadata.input.channels)
    try:
        loaded = written.load(weights, folder, images)
    except LibraryMissingError as missing:
        _require_equal(written.tensors(weights, folder), weights, written.name)
        by = f"names, shapes and values only, because {missing}"
        return Verification(0.0, by, features_compared=False)
    expected = features_of(weights, images)
    difference = largest_difference(loaded.features, expected)
    allowed = TOLERANCE[next(iter(loaded.features.values())).dtype]
    if difference > allowed:
        rounding = largest_difference(expected, features_of(weights, images.double()))
        allowed = max(allowed, _TIMES_OWN_ROUNDING * rounding)
    if not difference <= allowed:
        raise RunError(
            f"{weights.address}: loaded into {loaded.by}, the features differ from dupr's by "
            f"{difference:.1e} (allowed {allowed:.0e}). Nothing was written."
        )
    return Verification(difference, loaded.by, features_compared=True)


def fixed_images(channels: int = 3) -> Tensor:
    """(2, channels, 96, 128) fixed images: the same numbers every time."""
    return torch.randn(2, channels, 96, 128, generator=torch.Generator().manual_seed(0))


def features_of(weights: Weights, images: Tensor) -> Features:
    """dupr's own features, in the precision of the images."""
    metadata = weights.metadata
    backbone = make_backbone(metadata.architecture, metadata.input.channels).eval()
    load_backbone(backbone, weights)
    backbone.to(images.dtype)
    features: Features = backbone(images)
    return features


def _require_equal(tensors: dict[str, Tensor], weights: Weights, name: str) -> None:
    for key, tensor in weights.tensors.items():
        if key not in tensors or not torch.equal(tensors[key], tensor):
            raise RunError(
                f"{weights.address}: {key} changed when read back from {name}. Nothing was written."
            )


def largest_difference(found: Features, expected: Features) -> float:
    """Infinite if a level is missing or has another shape."""
    largest = 0.0
    for level in expected:
        if level not in found or found[level].shape != expected[level].shape:
            return float("inf")
        deviation = (found[level].float() - expected[level]).abs().max()
        difference = float(deviation / expected[level].abs().max())
        # max() would drop a NaN.
        largest = difference if not difference <= largest else largest
    return largest
