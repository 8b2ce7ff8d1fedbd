"""Weights and runs of random networks."""

from __future__ import annotations

from pathlib import Path

import torch

from dupr_cli.artifacts.run import CheckpointState, write_checkpoint
from dupr_cli.artifacts.weights import WeightsMetadata, write_weights
from dupr_cli.models.backbone import make_backbone
from dupr_cli.models.resnet import ResNetBackbone

METADATA = WeightsMetadata("torchvision", "resnet18", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 64)


def make_run(folder: Path, architecture: str) -> dict[str, torch.Tensor]:
    """A run directory with one checkpoint; returns the query encoder's backbone."""
    torch.manual_seed(0)
    query, key = make_backbone(architecture), make_backbone(architecture)
    query.train()(torch.randn(4, 3, 64, 64))  # statistics that are not the initial ones
    model = {f"query.backbone.{n}": t for n, t in query.state_dict().items()}
    model |= {f"key.backbone.{n}": t for n, t in key.state_dict().items()}
    state = CheckpointState(5, architecture, [0.4] * 3, [0.2] * 3, 64, "d", {})
    write_checkpoint(folder, state, model, {}, keep=1)
    return query.state_dict()


def random_weights(file: Path, seed: int = 0) -> Path:
    """A weights file of a random ResNet-18."""
    torch.manual_seed(seed)
    write_weights(file, ResNetBackbone("resnet18").state_dict(), METADATA)
    return file
