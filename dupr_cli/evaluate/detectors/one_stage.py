"""One-stage networks: a backbone, and a dense head on the maps of some of its levels.

The head takes maps, not images, so the same head trains on a backbone that is fine-tuned and on
features of a frozen one that were computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from dupr_cli.evaluate.detector_data import DENSE_LEVELS, AnyOutput, AnyTarget
from dupr_cli.evaluate.detectors.norms import make_norm
from dupr_cli.models.backbone import Backbone, as_backbone
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import DetectorSection

DENSE_STRIDES = (8, 16, 32, 64, 128)
"""Strides of the pyramid on DENSE_LEVELS, with its two coarser levels."""


class DenseHead(Protocol):
    """Maps of a backbone's levels to losses or detections. Implementations are nn.Modules.

    maps: of each of `levels`, (N, C, H / stride, W / stride). sizes: height and width of each image
    in pixels, without padding.
    """

    levels: tuple[Level, ...]

    def losses(
        self, maps: Mapping[Level, Tensor], targets: Sequence[AnyTarget]
    ) -> dict[str, Tensor]: ...

    def detect(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[AnyOutput]: ...


class OneStage(nn.Module):
    """Backbone and dense head. `divisible`: sides of a batch are multiples of this."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.divisible = as_backbone(backbone).strides["res5"]

    def losses(self, images: ImageList, targets: Sequence[AnyTarget]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode."""
        head = cast(DenseHead, self.head)
        return head.losses(self._maps(images), targets)

    def detect(self, images: ImageList) -> list[AnyOutput]:
        """Detections of a batch; call in evaluation mode."""
        head = cast(DenseHead, self.head)
        return head.detect(self._maps(images), images.image_sizes)

    def _maps(self, images: ImageList) -> Mapping[Level, Tensor]:
        maps: Mapping[Level, Tensor] = self.backbone(
            images.tensors, cast(DenseHead, self.head).levels
        )
        return maps


def dense_pyramid(
    backbone: Backbone, detector: DetectorSection, strides: Sequence[int]
) -> FeaturePyramidNetwork:
    """A feature pyramid on res3 to res5, with two coarser levels if there are five strides.

    Source: Lin et al. 2017, as in RetinaNet.
    """
    coarser = None
    if len(strides) > len(DENSE_LEVELS):
        coarser = LastLevelP6P7(backbone.channels["res5"], detector.pyramid_channels)
    return FeaturePyramidNetwork(
        [backbone.channels[level] for level in DENSE_LEVELS],
        detector.pyramid_channels,
        coarser,
        None if detector.new_norm == "none" else make_norm(detector.new_norm),
    )


def dense_centres(backbone: Backbone, strides: Sequence[int]) -> list[float]:
    """`first_centres` of the pyramid's levels; the coarser ones begin where res5 does."""
    levels = [*DENSE_LEVELS, *["res5"] * (len(strides) - len(DENSE_LEVELS))]
    return [backbone.first_centres[cast(Level, level)] for level in levels]
