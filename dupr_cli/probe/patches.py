"""Patches across views: does a patch find itself again in another view of its image?

Two fixed views of every image are cut and augmented, and the region that they share is pooled into
bins in both; a bin of the first view counts when its own, among all bins of all second views, is
the most similar by the cosine. Nothing is trained.
Source: docs/method.md, "Is it learning?", with the geometry of pre-training (`views.geometry`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as photometric

from dupr_cli.probe.data import ImageSet
from dupr_cli.probe.loading import cut_view, pixels
from dupr_cli.recipe import Level
from dupr_cli.recipe.base import LEVEL_STRIDES
from dupr_cli.recipe.probe import RetrievalSection
from dupr_cli.views.geometry import as_crop, pool_patches, random_crop_pair, shared_region_boxes

_CHUNK = 2048  # queries compared with the pool at a time
_POOL = 16384  # and rows of the pool

Maps = Callable[[Tensor, Sequence[Level]], dict[Level, Tensor]]


@dataclass(frozen=True)
class ViewBatch:
    """Two views of each image. views: (N, 2, 3, S, S) uint8. crops: (N, 2, 4) in source pixels.
    flips: (N, 2) bool."""

    views: Tensor
    crops: Tensor
    flips: Tensor

    @staticmethod
    def stack(items: list[ViewBatch]) -> ViewBatch:
        return ViewBatch(
            torch.cat([item.views for item in items]),
            torch.cat([item.crops for item in items]),
            torch.cat([item.flips for item in items]),
        )


@dataclass(frozen=True)
class ViewPairs:
    """Reads both views of an image: a function of the seed and the image's id, so that every
    backbone is asked the same."""

    images: ImageSet
    section: RetrievalSection
    seed: int

    def __call__(self, position: int) -> ViewBatch:
        image = self.images.image(position)
        digest = hashlib.sha256(self.images.ids[position].encode()).digest()
        random = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big")])
        crops = random_crop_pair(image.width, image.height, self.section.views, random)
        flips = random.random(2) < self.section.flip_probability
        views = []
        for crop, flip in zip(crops, flips, strict=True):
            view = cut_view(image, as_crop(crop), self.section.views.size, bool(flip))
            views.append(recoloured(pixels(view), self.section, random))
        return ViewBatch(
            torch.stack(views)[None], torch.from_numpy(crops)[None], torch.from_numpy(flips)[None]
        )


def recoloured(view: Tensor, section: RetrievalSection, random: np.random.Generator) -> Tensor:
    """A view (3, S, S) uint8 with MoCo v2's jitter, grayscale and blur, as the recipe has them.

    Source: docs/method.md, "Views"; the operations are torchvision's.
    """
    jitter, blur = section.color_jitter, section.blur
    if random.random() < jitter.probability:
        factors = {
            "brightness": random.uniform(max(0.0, 1 - jitter.brightness), 1 + jitter.brightness),
            "contrast": random.uniform(max(0.0, 1 - jitter.contrast), 1 + jitter.contrast),
            "saturation": random.uniform(max(0.0, 1 - jitter.saturation), 1 + jitter.saturation),
            "hue": random.uniform(-jitter.hue, jitter.hue),
        }
        for name in random.permutation(list(factors)):
            view = getattr(photometric, f"adjust_{name}")(view, factors[name])
    if random.random() < section.grayscale_probability:
        view = photometric.rgb_to_grayscale(view, num_output_channels=3)
    if random.random() < blur.probability:
        sigma = float(random.uniform(*blur.sigma))
        # Three standard deviations a side, and an odd kernel that the view is larger than.
        side = min(2 * math.ceil(3 * sigma) + 1, view.shape[-1] // 2 * 2 - 1)
        view = photometric.gaussian_blur(view, [side, side], [sigma, sigma])
    return view


def view_bins(
    maps: Maps, batch: ViewBatch, levels: Sequence[Level], section: RetrievalSection
) -> dict[Level, tuple[Tensor, Tensor]]:
    """Bins of the region that both views share, (M, C) of the first and of the second view.

    maps: images (N, 3, S, S) uint8 to feature maps of the levels. Row i of both shows one place of
    one image. Images whose views share too little have none.
    """
    size = section.views.size
    boxes, valid = shared_region_boxes(batch.crops, batch.flips, size, section.views.min_overlap)
    found: dict[Level, list[Tensor]] = {level: [] for level in levels}
    for view in range(2):
        for level, features in maps(batch.views[:, view], levels).items():
            device = features.device
            pooled = pool_patches(
                features,
                boxes[:, view].to(device),
                batch.flips[:, view].to(device),
                section.bins,
                LEVEL_STRIDES[level],
            )
            found[level].append(pooled[valid.to(device)].flatten(0, 1))
    return {level: (first, second) for level, (first, second) in found.items()}


def own_ranks(queries: Tensor, pool: Tensor) -> Tensor:
    """(M,) how many other rows of `pool` (M, C) are at least as similar to a query as its own row.

    queries: (M, C); 0 where the most similar is its own. Equal similarities count against it, so
    that features which are all the same find nothing.
    """
    queries, pool = F.normalize(queries, dim=1), F.normalize(pool, dim=1)
    ranks = []
    for first in range(0, len(queries), _CHUNK):
        query = queries[first : first + _CHUNK]
        places = torch.arange(first, first + len(query), device=query.device)
        own = (query * pool[places]).sum(1, keepdim=True)
        count = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        for start in range(0, len(pool), _POOL):
            block = query @ pool[start : start + _POOL].T
            # The same product may be rounded differently in a sum and in a matrix product.
            rivals = block >= own - 1e-6
            inside = (places >= start) & (places < start + block.shape[1])
            rivals[inside.nonzero()[:, 0], (places - start)[inside]] = False
            count += rivals.sum(1)
        ranks.append(count)
    return torch.cat(ranks)
