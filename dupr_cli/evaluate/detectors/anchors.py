"""Anchors: the reference boxes for the offsets of proposals and RetinaNet's detections.

Unlike torchvision's, they are not rounded to whole pixels and lie exactly one stride of their level
apart, as in the protocols. Source: Ren et al. 2015; Lin et al. 2017 (three octaves of RetinaNet).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList


class Anchors(nn.Module):
    """Anchors of all levels: at every cell, each size with each ratio.

    A ResNet's are centred on the corner of its cells, as in the protocols: half a pixel from where
    the cells are. Those of other networks lie half a pixel from their cells, too.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        strides: Sequence[int],
        octaves: int = 1,
        first_centres: Sequence[float] | None = None,
    ) -> None:
        """sizes: of each level, pixels. ratios: height over width. strides: of the levels.
        first_centres: of the levels' first cells, see `Backbone`; those of a ResNet by default.
        """
        super().__init__()
        self.strides = tuple(strides)
        self._first = [centre - 0.5 for centre in first_centres or [0.5] * len(strides)]
        steps = [2 ** (k / octaves) for k in range(octaves)]
        self._shapes = [
            torch.tensor([_shape(size * step, ratio) for size in of_level for step in steps
                          for ratio in ratios])
            for of_level in sizes
        ]  # fmt: skip

    @property
    def per_cell(self) -> int:
        return len(self._shapes[0])

    def of_level(self, level: int, feature: Tensor) -> Tensor:
        """(H * W * per_cell, 4) boxes in pixels of the padded image, for a map (N, C, H, W)."""
        (height, width), device = feature.shape[-2:], feature.device
        shapes = self._shapes[level].to(device)
        stride, first = self.strides[level], self._first[level]
        y, x = (torch.arange(n, device=device) * stride + first for n in (height, width))
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1).float()
        return (corners[:, :, None] + shapes).view(-1, 4)

    def forward(self, images: ImageList, features: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of all levels, one after the other, for each image."""
        levels = [self.of_level(i, feature) for i, feature in enumerate(features)]
        return [torch.cat(levels)] * len(images.image_sizes)


def _shape(size: float, ratio: float) -> list[float]:
    width = size / ratio**0.5
    height = width * ratio
    return [-width / 2, -height / 2, width / 2, height / 2]
