"""The torchvision layout: the state dict of torchvision.models.resnetXX without fc."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.weights import Weights, load_backbone, read_safetensors, write_weights
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.errors import RunError
from dupr_cli.recipe.base import LEVELS

# The same operations in the same order: anything above rounding is an error.
_TOLERANCE = 1e-5


def write(weights: Weights, path: Path) -> float:
    """Write the weights file at `path` and load it back into torchvision's own model.

    Returns the largest absolute difference between its features after layer4 and dupr's, relative
    to their largest value, on a fixed input in evaluation mode.
    Raises UsageError when the weights are not those of their architecture, RunError, leaving
    nothing at `path`, when the two networks differ.
    """
    ours = ResNetBackbone(weights.metadata.architecture).eval()
    load_backbone(ours, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate = path.with_name(f".{path.name}.unverified.tmp")
    try:
        write_weights(candidate, weights.tensors, weights.metadata)
        difference = _compare(ours, weights, candidate)
        with atomic_file(path) as file:
            file.write(candidate.read_bytes())
    finally:
        candidate.unlink(missing_ok=True)
    return difference


@torch.no_grad()
def _compare(ours: ResNetBackbone, weights: Weights, path: Path) -> float:
    architecture = weights.metadata.architecture
    theirs = torchvision.models.get_model(architecture, weights=None)
    theirs.fc = nn.Identity()
    tensors, _ = read_safetensors(path)
    try:
        theirs.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise RunError(
            f"{weights.address}: torchvision's {architecture} refuses the weights: {error}"
        ) from error
    theirs.eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = ours(images, LEVELS)["res5"].mean((2, 3))
    difference = float((theirs(images) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise RunError(
            f"{weights.address}: loaded back into torchvision, the features differ by "
            f"{difference:.1e} (allowed {_TOLERANCE:.0e}). Nothing was written."
        )
    return difference
