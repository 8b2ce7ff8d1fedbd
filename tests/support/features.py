"""Features of classes, drawn."""

from __future__ import annotations

import numpy as np
import torch


def clusters(seed: int, count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, count - classes)])
    centres = np.random.default_rng(0).normal(size=(classes, 8))
    features = centres[labels] + random.normal(size=(count, 8))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
