"""The region that two views of an image share, and the pooling of its patches.

Coordinates are pixel edges: a view of side `size` spans 0 to `size`, the centre of its first pixel
is at 0.5. Crops are resized and only then mirrored, and feature maps are read where the backbone's
cells are centred, so that a point of the source image has the same meaning all the way to the
patches, mirrored or not.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dupr_cli.recipe.pretrain import ViewsSection

Crop = tuple[int, int, int, int]

# Two samples per bin side: at most one feature cell apart for bins as large as two cells, at a cost
# that does not depend on the region.
_SAMPLING_RATIO = 2


class Grid(NamedTuple):
    """Where the cells of a feature map lie in a view: cell i is centred at first + i * stride.

    stride, first: pixels, from the view's left and upper edge. The convention of RoIAlign, and of
    detectors, is first = stride / 2; docs/method.md, "Patches", tells where real cells lie.
    """

    stride: int
    first: float


class CropRange(Protocol):
    """The range of random crops: share of the image's area, and width over height."""

    @property
    def scale(self) -> tuple[float, float]: ...

    @property
    def ratio(self) -> tuple[float, float]: ...


def random_crop(width: int, height: int, views: CropRange, random: np.random.Generator) -> Crop:
    """One random resized crop as x0, y0, x1, y1 in source pixels.

    Area and aspect ratio (log-uniform) are drawn until the crop fits, ten times; then the largest
    centred crop of an allowed ratio is taken.
    Source: torchvision's RandomResizedCrop, as MoCo v2 uses it.
    """
    for _ in range(10):
        area = width * height * random.uniform(*views.scale)
        ratio = np.exp(random.uniform(*np.log(views.ratio)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return x, y, x + w, y + h
    w = max(1, min(width, round(height * views.ratio[1])))
    h = max(1, min(height, round(width / views.ratio[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def overlap_fraction(first: Crop, second: Crop) -> float:
    """Smallest share of a side, over both views and directions, that the shared region covers."""
    shares = []
    for low, high in ((0, 2), (1, 3)):
        shared = min(first[high], second[high]) - max(first[low], second[low])
        longer = max(first[high] - first[low], second[high] - second[low])
        shares.append(shared / longer)
    return max(0.0, min(shares))


def as_crop(edges: NDArray[np.floating]) -> Crop:
    """A crop from (4,) whole pixels, as `random_crop_pair` returns them."""
    left, top, right, bottom = edges.tolist()
    return int(left), int(top), int(right), int(bottom)


def random_crop_pair(
    width: int, height: int, views: ViewsSection, random: np.random.Generator
) -> NDArray[np.float32]:
    """Two crops (2, 4) of one image, redrawn until they overlap enough or attempts run out.

    Source: docs/method.md, "Views". A pair with too little overlap is still returned;
    `shared_region_boxes` marks it invalid.
    """
    for _ in range(views.overlap_attempts):
        first, second = (random_crop(width, height, views, random) for _ in range(2))
        if overlap_fraction(first, second) >= views.min_overlap:
            break
    return np.array([first, second], dtype=np.float32)


def shared_region_boxes(
    crops: Tensor, flips: Tensor, size: int, min_overlap: float
) -> tuple[Tensor, Tensor]:
    """Boxes of the region that two views share, in each view's own pixels.

    crops: (N, 2, 4) x0, y0, x1, y1 of both crops in the source image, pixels.
    flips: (N, 2) bool, view mirrored left to right after cropping.
    size: side of the square views, pixels.
    min_overlap: smallest share of a view's side that a usable region must cover.
    Returns boxes (N, 2, 4) in view pixels and valid (N,) bool. If the crops share too little, the
    boxes are the whole views: their patches can serve as negatives, not as pairs.
    Source: docs/method.md, "Shared region".
    """
    region = torch.cat([crops[..., :2].amax(1), crops[..., 2:].amin(1)], dim=1)  # (N, 4)
    origin = crops[..., :2].repeat(1, 1, 2)  # (N, 2, 4): x0, y0, x0, y0
    side = (crops[..., 2:] - crops[..., :2]).repeat(1, 1, 2)
    boxes = (region[:, None] - origin) * (size / side)
    x0, y0, x1, y1 = boxes.unbind(-1)
    mirrored = torch.stack([size - x1, y0, size - x0, y1], dim=-1)
    boxes = torch.where(flips[..., None], mirrored, boxes)
    shares = (boxes[..., 2:] - boxes[..., :2]) / size  # (N, 2, 2)
    # Rounding must not exclude a pair that was drawn to overlap by exactly the minimum.
    valid = (shares > 0).all(-1).all(-1) & (shares >= min_overlap - 1e-4).all(-1).all(-1)
    whole = torch.tensor([0.0, 0.0, size, size], device=boxes.device)
    return torch.where(valid[:, None, None], boxes, whole), valid


def pool_patches(features: Tensor, boxes: Tensor, flips: Tensor, bins: int, grid: Grid) -> Tensor:
    """Pool the shared region of each image into bins x bins patches.

    features: (N, C, H, W), with cells at `grid`. boxes: (N, 4) in view pixels.
    flips: (N,) bool; the grid of a mirrored view is reversed along its width, so that the same bin
    shows the same place in both views.
    Returns (N, bins * bins, C) float32, row by row.
    Source: docs/method.md, "Patches".
    """
    # Here, because torchvision also loads torch's compiler, which no dry run needs.
    from torchvision.ops import roi_align

    images = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    # RoIAlign takes the first cell's centre to be at half a stride.
    moved = boxes + (grid.stride / 2 - grid.first)
    pooled: Tensor = roi_align(
        features.float(),
        torch.cat([images, moved], dim=1),
        output_size=bins,
        spatial_scale=1 / grid.stride,
        sampling_ratio=_SAMPLING_RATIO,
        aligned=True,
    )
    pooled = torch.where(flips[:, None, None, None], pooled.flip(3), pooled)
    return pooled.flatten(2).transpose(1, 2)
