"""FCN: a few dilated convolutions on res5 that give every cell a score of each class.

Source: MoCo (He et al. 2020), appendix, "Semantic segmentation", after Long et al. 2015.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.evaluate.cell_scores import CellScores
from dupr_cli.evaluate.detector_data import SEMANTIC_LEVELS, SemanticTarget
from dupr_cli.evaluate.detectors.norms import make_norm
from dupr_cli.metrics.semantic import IGNORE
from dupr_cli.models.backbone import Backbone
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import EvaluateRecipe
from dupr_cli.runtime.parallel import World


class Fcn(nn.Module):
    """A `DenseHead` whose outputs are scores of cells."""

    levels = SEMANTIC_LEVELS

    def __init__(
        self, backbone: Backbone, num_classes: int, recipe: EvaluateRecipe, world: World
    ) -> None:
        """backbone: only its level's shape is looked at, so it is dilated before."""
        super().__init__()
        semantic, norm = recipe.semantic, make_norm(recipe.detector.new_norm)
        self._world = world
        self._stride = backbone.strides["res5"]
        self._first_centre = backbone.first_centres["res5"]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = backbone.channels["res5"]
        for number in range(semantic.convolutions):
            convolution = nn.Conv2d(
                channels, semantic.channels, 3, padding=semantic.dilation,
                dilation=semantic.dilation, bias=False,
            )  # fmt: skip
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers[f"conv{number + 1}"] = convolution
            layers[f"norm{number + 1}"] = norm(semantic.channels)
            layers[f"relu{number + 1}"] = nn.ReLU(inplace=True)
            channels = semantic.channels
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        self.convolutions = nn.Sequential(layers)

    def losses(
        self, maps: Mapping[Level, Tensor], targets: list[SemanticTarget]
    ) -> dict[str, Tensor]:
        """Cross entropy, the mean over all labelled pixels of the batch in all processes."""
        scores = self._scores(maps, [target.size for target in targets])
        total = scores[0].values.new_zeros((), dtype=torch.float32)
        labelled = total.clone()
        for of_image, target in zip(scores, targets, strict=True):
            of_pixels, mask = of_image.at_pixels()[None], target.mask[None].long()
            total = total + F.cross_entropy(of_pixels, mask, ignore_index=IGNORE, reduction="sum")
            labelled = labelled + (mask != IGNORE).sum()
        # Gradients are averaged over processes, whose batches have different numbers of pixels.
        count = self._world.sum(labelled) / self._world.size
        return {"segmentation": total / count.clamp(min=1)}

    def detect(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[CellScores]:
        """Scores of each image's cells. sizes: height and width of each image, pixels."""
        return self._scores(maps, sizes)

    def _scores(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[CellScores]:
        values = self.classifier(self.convolutions(maps["res5"]))
        return [
            CellScores(of_image, size, self._stride, self._first_centre)
            for of_image, size in zip(values, sizes, strict=True)
        ]
