"""The FCN's input: images scaled, cut and mirrored together with their masks, in batches.

Every batch is a pure function of (seed, iteration), as in detection_data.py. Images are resized
with Pillow's antialiased bilinear filter; masks by nearest neighbour, so that no pixel gets a class
between two others. Part of a crop that lies outside the image is labelled as nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from PIL import Image

from dupr_cli.artifacts.pixel_formats import AnyImage
from dupr_cli.datasets.labelled import Annotation
from dupr_cli.datasets.masks import Mask
from dupr_cli.datasets.placement import Placement
from dupr_cli.datasets.semantic import SemanticSet
from dupr_cli.evaluate.detection_data import SemanticBatch
from dupr_cli.evaluate.detector_data import SemanticTarget
from dupr_cli.metrics.semantic import IGNORE
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.semantic import SemanticSection

# Streams of random numbers; the last word of the seed separates them.
_ORDER, _FLIP, _SCALE, _OFFSET = range(4)


@dataclass(frozen=True)
class Cut:
    """The square that is cut from a scaled image. scale: factor of the image's size. left, top: its
    place, as shares of what the image has beyond the square."""

    scale: float
    left: float
    top: float


@dataclass(frozen=True)
class SemanticRequest:
    """One image of a batch: its position in the set, and its changes. cut: None for all of it."""

    position: int
    cut: Cut | None = None
    flip: bool = False


def scaled_size(
    width: int, height: int, semantic: SemanticSection, scale: float = 1.0
) -> tuple[int, int]:
    """Width and height with the recipe's short side, or the image's own, times `scale`."""
    if semantic.short_side is not None:
        scale *= semantic.short_side / min(width, height)
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


class SemanticOrder:
    """The endless requests of all iterations from `start` on.

    Images that do not fill a batch at the end of an epoch start the next one; nothing is dropped.
    whole: without cuts, as for features of a frozen backbone.
    """

    def __init__(
        self, images: int, recipe: EvaluateRecipe, seed: int, start: int = 0, whole: bool = False
    ) -> None:
        self._images, self._recipe, self._seed = images, recipe, seed
        self._start, self._whole = start, whole

    def __iter__(self) -> Iterator[list[SemanticRequest]]:
        requests, size = self._requests(), self._recipe.train.batch_size
        batches = iter(lambda: list(islice(requests, size)), [])
        return islice(batches, self._start, None)

    def _requests(self) -> Iterator[SemanticRequest]:
        recipe, images = self._recipe, self._images
        for epoch in count():
            order = self._random(epoch, _ORDER).permutation(images)
            flips = (self._random(epoch, _FLIP).random(images) < 0.5) & recipe.data.flip
            scales = self._random(epoch, _SCALE).uniform(*recipe.semantic.scale, images)
            offsets = self._random(epoch, _OFFSET).random((images, 2))
            for position, scale, (left, top), flip in zip(
                order, scales, offsets, flips, strict=True
            ):
                cut = None if self._whole else Cut(float(scale), float(left), float(top))
                yield SemanticRequest(int(position), cut, bool(flip))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, stream])


class SemanticLoading:
    """Decodes, scales, cuts and mirrors the image and the mask of a request."""

    def __init__(self, images: SemanticSet, recipe: EvaluateRecipe, masks: bool) -> None:
        """masks: whether they are read; without, targets are left out."""
        self._images, self._semantic, self._masks = images, recipe.semantic, masks

    def __call__(self, request: SemanticRequest) -> SemanticBatch:
        """Raises RunError naming an image or mask that cannot be read."""
        image = self._images.image(request.position)
        scale = 1.0 if request.cut is None else request.cut.scale
        size = scaled_size(image.width, image.height, self._semantic, scale)
        pixels = _resized(image, size)
        mask = resized_mask(self._images, request.position, size) if self._masks else None
        if request.cut is not None:
            side = self._semantic.crop
            left = int(request.cut.left * (max(0, size[0] - side) + 1))
            top = int(request.cut.top * (max(0, size[1] - side) + 1))
            pixels = pixels[top : top + side, left : left + side]
            if mask is not None:
                part = mask[top : top + side, left : left + side]
                mask = np.full((side, side), IGNORE, dtype=np.uint8)
                mask[: part.shape[0], : part.shape[1]] = part
        if request.flip:
            # Before padding, which stays at the right and at the bottom.
            width = pixels.shape[1]
            pixels = pixels[:, ::-1]
            if mask is not None:
                mask[:, :width] = mask[:, :width][:, ::-1].copy()
        targets = [] if mask is None else [SemanticTarget(torch.from_numpy(mask))]
        # torch takes neither Pillow's read-only memory nor negative strides.
        return SemanticBatch([torch.from_numpy(pixels.copy()).permute(2, 0, 1)], targets)


def _resized(image: AnyImage, size: tuple[int, int]) -> np.ndarray:
    if image.size == size:
        return np.asarray(image)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def resized_mask(images: SemanticSet, position: int, size: tuple[int, int]) -> Mask:
    """The mask of an image resized to `size`, width and height, by nearest neighbour."""
    mask = images.mask(position)
    values: Mask = Placement(1, mask.shape[1], mask.shape[0], *size).values(mask)
    return values


def whole_size(annotation: Annotation, recipe: EvaluateRecipe) -> tuple[int, int]:
    """Width and height of an image that is tested, or whose features are stored."""
    return scaled_size(annotation.width, annotation.height, recipe.semantic)
