"""Objects across images: test whether an object finds others of its class.

Each object is pooled by RoIAlign from the feature map of its whole image, including context, as a
detector would see it. It then looks for the objects of other images with the highest cosine
similarity. Nothing is trained. Source: our choice; precision at k is a usual retrieval metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, ChannelImage
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.probe.loading import pixels
from dupr_cli.recipe import Level
from dupr_cli.recipe.base import LEVEL_STRIDES

_CHUNK = 2048  # objects compared with all others at a time
_BINS = 4  # an object is pooled into this many bins a side, and then averaged
_PAD = (124, 116, 104)  # ImageNet's mean, to pad images to squares

Maps = Callable[[Tensor, Sequence[Level]], dict[Level, Tensor]]


@dataclass(frozen=True)
class ObjectBatch:
    """Whole images and their objects. images: (N, C, S, S), see `loading.pixels`. boxes: (n, 5),
    number of the image in the batch and x0, y0, x1, y1 in its pixels."""

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
    """Reads an image resized to a long side of `side` pixels, in the corner of a square, and the
    requested boxes."""

    images: LabelledSet
    wanted: dict[int, NDArray[np.float32]]
    side: int

    def __call__(self, position: int) -> ObjectBatch:
        image = self.images.image(position)
        scale = self.side / max(image.size)
        width, height = (max(1, round(edge * scale)) for edge in image.size)
        square = _padded(image.resize((width, height), Image.Resampling.BILINEAR), self.side)
        factors = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        boxes = torch.from_numpy(self.wanted[position] * factors)
        return ObjectBatch(pixels(square)[None], F.pad(boxes, (1, 0)))


def _padded(image: AnyImage, side: int) -> AnyImage:
    """The image in the upper left corner of a square, on ImageNet's mean, or on its own mean if it
    keeps its channels."""
    if isinstance(image, ChannelImage):
        values = np.empty((side, side, image.values.shape[2]), dtype=np.float32)
        values[:] = image.values.mean((0, 1))
        values[: image.height, : image.width] = image.values
        return ChannelImage(values)
    square = Image.new("RGB", (side, side), _PAD)
    square.paste(image)
    return square


def object_features(maps: Maps, batch: ObjectBatch, levels: Sequence[Level]) -> dict[Level, Tensor]:
    """(n, C) of every object: the mean over its bins of RoIAlign on the level."""
    # Here, because torchvision also loads torch's compiler, which no dry run needs.
    from torchvision.ops import roi_align

    features = maps(batch.images, levels)
    return {
        level: roi_align(
            features[level],
            batch.boxes.to(features[level].device),
            output_size=_BINS,
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

    Returns their boxes by image and, in the same order, the class and the image of each object.
    """
    wanted, names, places = {}, [], []
    for position, annotation in enumerate(images.annotations):
        sides = annotation.boxes[:, 2:] - annotation.boxes[:, :2]
        chosen = ~annotation.difficult & (sides.max(1, initial=0) >= min_object)
        if chosen.any():
            wanted[position] = annotation.boxes[chosen]
            names += [annotation.names[i] for i in np.flatnonzero(chosen)]
            places += [position] * int(chosen.sum())
    return wanted, names, places


def precision_at(
    features: Tensor, labels: Tensor, images: Tensor, neighbours: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """For each k, per object, the share of its k most similar objects of other images that have its
    class; and the expected share for random objects.

    features: (n, C). labels, images: (n,) class and image of each object. Objects with fewer than k
    others are measured on those; objects without others get NaN.
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
