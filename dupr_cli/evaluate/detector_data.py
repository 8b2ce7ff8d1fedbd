"""What passes between the data, the stored features and the detectors.

It needs nothing of torchvision, so that an evaluation can be planned without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dupr_cli.evaluate.cell_scores import CellScores
from dupr_cli.recipe.base import Level

# Levels of the detectors with a pyramid over all but the finest, and of stored features.
DENSE_LEVELS: tuple[Level, ...] = ("res3", "res4", "res5")
# The level that an FCN is on.
SEMANTIC_LEVELS: tuple[Level, ...] = ("res5",)


@dataclass(frozen=True)
class Target:
    """Objects of one image. boxes: (n, 4) pixels. labels: (n,). masks: (n, H, W) bool or None.

    keypoints: (n, K, 3) x, y in pixels as boxes are, and whether it is labelled (above 0), or None.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def to(self, device: torch.device) -> Target:
        masks = None if self.masks is None else self.masks.to(device)
        keypoints = None if self.keypoints is None else self.keypoints.to(device)
        return Target(self.boxes.to(device), self.labels.to(device), masks, keypoints)


@dataclass(frozen=True)
class SemanticTarget:
    """The class number of every pixel of one image, (H, W) uint8."""

    mask: Tensor

    def to(self, device: torch.device) -> SemanticTarget:
        return SemanticTarget(self.mask.to(device, non_blocking=True))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return int(self.mask.shape[0]), int(self.mask.shape[1])


@dataclass(frozen=True)
class HeadOutput:
    """Detections of one image, highest score first. masks: (d, M, M) probabilities in the boxes.

    keypoints: (d, K, 3) x, y in pixels as boxes are, and a score.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None


@dataclass(frozen=True)
class ImageMaps:
    """The features of one image. maps[level]: (C, h, w) float16. size: height and width in pixels
    of the resized image, without the padding that the maps include."""

    maps: dict[Level, Tensor]
    size: tuple[int, int]


AnyTarget = Target | SemanticTarget
AnyOutput = HeadOutput | CellScores
