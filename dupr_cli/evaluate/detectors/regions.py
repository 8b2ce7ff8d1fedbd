"""RoIAlign of proposals from one feature map (C4) or from the matching pyramid level (FPN).

torchvision's MultiScaleRoIAlign has aligned=False, which shifts regions by half a cell; the
protocols' ROIAlignV2 does not. Source: He et al. 2017; Lin et al. 2017, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

# A box of 224 x 224 pixels, ImageNet's size, uses the pyramid's level of stride 16.
_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16


class RegionPooling(nn.Module):
    """Boxes of a batch of images to cells of features."""

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        """size: side of the output, in cells. strides: of the maps that forward receives."""
        super().__init__()
        self.size, self.strides = size, tuple(strides)

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """boxes: per image (n, 4) in pixels. Returns (all n, C, size, size)."""
        rois = _with_image_numbers(boxes)
        if len(self.strides) == 1:
            return self._pool(features[0], rois, self.strides[0])
        levels = self._levels(rois[:, 1:])
        channels = features[0].shape[1]
        pooled = features[0].new_zeros(len(rois), channels, self.size, self.size)
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=False)):
            chosen = torch.where(levels == level)[0]
            pooled = pooled.index_put((chosen,), self._pool(feature, rois[chosen], stride))
        return pooled.contiguous(memory_format=torch.channels_last)

    def _pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        pooled: Tensor = roi_align(
            feature, rois.to(feature.dtype), self.size, spatial_scale=1 / stride, aligned=True
        )
        return pooled.contiguous(memory_format=torch.channels_last)

    def _levels(self, boxes: Tensor) -> Tensor:
        """The number of the map that each box is pooled from, (n,)."""
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        canonical = self.strides.index(_CANONICAL_STRIDE)
        level = canonical + torch.log2(sides / _CANONICAL_SIDE + 1e-8).floor()
        return level.clamp(0, len(self.strides) - 1).long()


def _with_image_numbers(boxes: list[Tensor]) -> Tensor:
    numbers = [of_image.new_full((len(of_image), 1), i) for i, of_image in enumerate(boxes)]
    return torch.cat([torch.cat(numbers), torch.cat(boxes)], dim=1)
