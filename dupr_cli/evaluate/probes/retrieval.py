"""Retrieval on frozen features: patches across views, and objects across images.

Patches: two fixed views of every image are cut and augmented, the region that they share is pooled
into bins in both; a bin of the first view counts when its own, among all bins of all second views,
is the most similar. Objects: each is pooled from the feature map of its whole image, and looks for
objects of its class in other images. Similarity is the cosine; neither needs any training.
Source: docs/method.md, "Is it learning?", with the geometry of pre-training (`dupr_cli.geometry`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as photometric

from dupr_cli.evaluate.labelled import LabelledSet
from dupr_cli.evaluate.probes.data import ImageSet
from dupr_cli.evaluate.probes.loading import cut_view, pixels
from dupr_cli.geometry import Crop, pool_patches, random_crop_pair, shared_region_boxes
from dupr_cli.recipe import Level
from dupr_cli.recipe.base import LEVEL_STRIDES
from dupr_cli.recipe.probe import RetrievalSection

_CHUNK = 2048  # queries compared with the pool at a time
_POOL = 16384  # and rows of the pool
_OBJECT_BINS = 4  # an object is pooled into so many bins a side before their mean is taken
_PAD = (124, 116, 104)  # ImageNet's mean, beside images that are no squares

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
            whole: Crop = tuple(int(edge) for edge in crop)  # type: ignore[assignment]
            view = cut_view(image, whole, self.section.views.size, bool(flip))
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


@dataclass(frozen=True)
class ObjectBatch:
    """Whole images and their objects. images: (N, 3, S, S) uint8. boxes: (n, 5), number of the
    image in the batch and x0, y0, x1, y1 in its pixels."""

    images: Tensor
    boxes: Tensor

    @staticmethod
    def stack(items: list[ObjectBatch]) -> ObjectBatch:
        boxes = [item.boxes.clone() for item in items]
        for number, of_image in enumerate(boxes):
            of_image[:, 0] = number
        return ObjectBatch(torch.cat([item.images for item in items]), torch.cat(boxes))


@dataclass(frozen=True)
class ObjectImages:
    """Reads an image resized to a long side of `side` pixels, in the corner of a square, and those
    of its boxes that are asked for."""

    images: LabelledSet
    wanted: dict[int, NDArray[np.float32]]
    side: int

    def __call__(self, position: int) -> ObjectBatch:
        image = self.images.image(position)
        scale = self.side / max(image.size)
        width, height = (max(1, round(edge * scale)) for edge in image.size)
        square = Image.new("RGB", (self.side, self.side), _PAD)
        square.paste(image.resize((width, height), Image.Resampling.BILINEAR))
        factors = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        boxes = torch.from_numpy(self.wanted[position] * factors)
        return ObjectBatch(pixels(square)[None], F.pad(boxes, (1, 0)))


def object_features(maps: Maps, batch: ObjectBatch, levels: Sequence[Level]) -> dict[Level, Tensor]:
    """(n, C) of every object: the mean over its bins of RoIAlign on the level."""
    features = maps(batch.images, levels)
    return {
        level: roi_align(
            features[level],
            batch.boxes.to(features[level].device),
            output_size=_OBJECT_BINS,
            spatial_scale=1 / LEVEL_STRIDES[level],
            sampling_ratio=2,
            aligned=True,
        ).mean((2, 3))
        for level in levels
    }


def searched_objects(
    images: LabelledSet, min_object: int
) -> tuple[dict[int, NDArray[np.float32]], list[str], list[int]]:
    """Objects that take part: not difficult, and of `min_object` pixels along their longer side.

    Returns their boxes by image, and of all of them in that order the class and the image.
    """
    wanted, names, places = {}, [], []
    for position, annotation in enumerate(images.annotations):
        sides = annotation.boxes[:, 2:] - annotation.boxes[:, :2]
        kept = ~annotation.difficult & (sides.max(1, initial=0) >= min_object)
        if kept.any():
            wanted[position] = annotation.boxes[kept]
            names += [annotation.names[i] for i in np.flatnonzero(kept)]
            places += [position] * int(kept.sum())
    return wanted, names, places


def precision_at(
    features: Tensor, labels: Tensor, images: Tensor, neighbours: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """For each k, per object, the share of its k most similar objects of other images that have its
    class; and what drawing them at random would give.

    features: (n, C). labels, images: (n,) class and image of each object. Objects without k others
    are measured on those there are; NaN for those without any.
    """
    features = F.normalize(features, dim=1)
    most = max(neighbours)
    found: dict[int, list[Tensor]] = {count: [] for count in neighbours}
    chances = []
    for first in range(0, len(features), _CHUNK):
        rows = slice(first, first + _CHUNK)
        others = images[rows, None] != images[None]
        same = (labels[rows, None] == labels[None]) & others
        similarities = (features[rows] @ features.T).masked_fill(~others, -torch.inf)
        best, chosen = similarities.topk(min(most, len(features)), dim=1)
        hits = same.gather(1, chosen).double().cumsum(1)
        there = (best > -torch.inf).double().cumsum(1)
        for count in neighbours:
            last = min(count, hits.shape[1]) - 1
            found[count].append(hits[:, last] / there[:, last])
        chances.append(same.sum(1).double() / others.sum(1).double())
    return {count: torch.cat(parts) for count, parts in found.items()}, torch.cat(chances)
