"""The detector's input: images resized and flipped with their boxes, in batches.

Every batch is a pure function of (seed, iteration): its images, their flips and short sides. So
all compared weights train on the same batches, with any number of loader workers. Images are
resized with Pillow's antialiased bilinear filter, as in the protocol's loader, and stay uint8 until
they are on the training device; images that keep their channels are floats from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dupr_cli.datasets.labelled import Annotation, LabelledSet
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detector_data import AnyTarget, ImageMaps, SemanticTarget, Target
from dupr_cli.recipe.evaluate import DetectionDataSection, EvaluateRecipe
from dupr_cli.runtime.parallel import World

Request = TypeVar("Request")
TargetT = TypeVar("TargetT", Target, SemanticTarget)

# Streams of random numbers; the last word of the seed separates them.
_ORDER, _FLIP, _SIZE = range(3)


@dataclass(frozen=True)
class ImageBatch(Generic[TargetT]):
    """Images of one step, with their targets.

    images: (C, H, W) each, uint8 in RGB, or float32 in 0..1 of own channels. targets: boxes in
    pixels of that image, or its mask; class numbers from 0.
    """

    images: list[Tensor]
    targets: list[TargetT]

    def pin_memory(self) -> ImageBatch[TargetT]:
        """The loader calls this for a CUDA device."""
        return ImageBatch([image.pin_memory() for image in self.images], self.targets)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each resized image, pixels."""
        return [(int(image.shape[1]), int(image.shape[2])) for image in self.images]


@dataclass(frozen=True)
class FeatureBatch:
    """`ImageBatch` with the stored features of images in place of their pixels."""

    images: list[ImageMaps]
    targets: Sequence[AnyTarget]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each resized image, pixels."""
        return [image.size for image in self.images]


DetectionBatch = ImageBatch[Target]
SemanticBatch = ImageBatch[SemanticTarget]
Batch = DetectionBatch | SemanticBatch | FeatureBatch


@dataclass(frozen=True)
class ImageRequest:
    """One image of a batch: its position in the set, and its changes."""

    position: int
    short_side: int
    flip: bool = False


def resized_size(
    width: int, height: int, short_side: int, data: DetectionDataSection
) -> tuple[int, int]:
    """Width and height with the short side as given, unless the long side exceeds data.max_size;
    with data.square, both are the short side."""
    if data.square:
        return short_side, short_side
    scale = min(short_side / min(width, height), data.max_size / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def flip_boxes(boxes: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Mirror (n, 4) boxes with their image, left to right; pixel edges, so width - x is exact."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


class TrainingOrder:
    """The endless requests of all iterations from `start` on.

    Images that do not fill a batch at the end of an epoch start the next one; nothing is dropped.
    With `data.group_by_aspect`, wide and tall images are batched separately, as in detectron2: an
    image waits for others of its kind. With `data.square`, the images of a batch have the size that
    its first one drew.
    """

    def __init__(
        self, images: LabelledSet, recipe: EvaluateRecipe, seed: int, start: int = 0
    ) -> None:
        self._wide = [a.width >= a.height for a in images.annotations]
        self._recipe, self._seed, self._start = recipe, seed, start

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        return islice(self._batches(), self._start, None)

    def _batches(self) -> Iterator[list[ImageRequest]]:
        waiting: dict[bool, list[ImageRequest]] = {False: [], True: []}
        for request in self._requests():
            kind = self._wide[request.position] or not self._recipe.data.group_by_aspect
            waiting[kind].append(request)
            if len(waiting[kind]) == self._recipe.train.batch_size:
                yield self._sized(waiting[kind])
                waiting[kind] = []

    def _sized(self, batch: list[ImageRequest]) -> list[ImageRequest]:
        if not self._recipe.data.square:
            return batch
        return [replace(request, short_side=batch[0].short_side) for request in batch]

    def _requests(self) -> Iterator[ImageRequest]:
        data, images = self._recipe.data, len(self._wide)
        for epoch in count():
            order = self._random(epoch, _ORDER).permutation(images)
            flips = (self._random(epoch, _FLIP).random(images) < 0.5) & data.flip
            sizes = self._random(epoch, _SIZE).choice(data.train_sizes, images)
            for position, side, flip in zip(order, sizes, flips, strict=True):
                yield ImageRequest(int(position), int(side), bool(flip))

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, stream])


class PartOfBatches(Generic[Request]):
    """The equal part of every batch that one of several processes takes, in rank order."""

    def __init__(self, batches: Iterable[Sequence[Request]], world: World) -> None:
        self._batches, self._world = batches, world

    def __iter__(self) -> Iterator[Sequence[Request]]:
        for batch in self._batches:
            size = len(batch) // self._world.size
            yield batch[self._world.rank * size : (self._world.rank + 1) * size]


class ImageLoading:
    """Decodes, resizes and flips the image of a request."""

    def __init__(
        self, images: LabelledSet, data: DetectionDataSection, classes: Sequence[str], masks: bool
    ) -> None:
        self._images, self._data, self._classes, self._masks = images, data, classes, masks
        self._keypoint_flips = keypoint_flips(images, data)

    def __call__(self, request: ImageRequest) -> DetectionBatch:
        """Crowds are left out of training. Raises RunError naming an image that cannot be read."""
        image = self._images.image(request.position)
        annotation = self._images.annotations[request.position]
        width, height = resized_size(image.width, image.height, request.short_side, self._data)
        target = resized_target(
            annotation, self._classes, width, height, request.flip, self._keypoint_flips
        )
        # torch rejects Pillow's read-only memory, so this is a copy.
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        masks = None
        if self._masks:
            drawn = self._images.masks(request.position)[~annotation.crowd]
            masks = np.zeros((len(drawn), height, width), dtype=np.bool_)
            for mask, one in zip(masks, drawn, strict=True):
                mask[:] = Image.fromarray(one).resize((width, height), Image.Resampling.NEAREST)
        if request.flip:
            pixels = pixels[:, ::-1].copy()
            masks = None if masks is None else masks[:, :, ::-1].copy()
        if masks is not None:
            target = replace(target, masks=torch.from_numpy(masks))
        return DetectionBatch([torch.from_numpy(pixels).permute(2, 0, 1)], [target])


# The number of each of COCO's keypoints of a person in a mirrored image: left and right change.
_COCO_FLIPS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


def keypoint_flips(images: LabelledSet, data: DetectionDataSection) -> list[int]:
    """The number of the keypoint that each becomes in a mirrored image; empty without keypoints.

    Raises UsageError when neither the recipe nor the set says so, or for a wrong number of them.
    """
    count = images.keypoint_count
    if not count or not data.flip:
        return []
    flips = data.keypoint_flips or images.keypoint_flips
    if flips is None and count == len(_COCO_FLIPS):
        flips = list(_COCO_FLIPS)
    if flips is None or sorted(flips) != list(range(count)):
        given = "not given" if flips is None else f"{flips}"
        raise UsageError(
            f"data.keypoint_flips: {given}, but objects of {images.address} have {count} "
            f"keypoints; give the number that each gets in a mirrored image, each of 0 to "
            f"{count - 1} once, or data.flip=false. (recipe key: data.keypoint_flips)"
        )
    return flips


def resized_target(
    annotation: Annotation,
    classes: Sequence[str],
    width: int,
    height: int,
    flip: bool,
    flips: Sequence[int] = (),
) -> Target:
    """Boxes, classes and keypoints of an image resized to (width, height) pixels; crowds are left
    out. flips: see `keypoint_flips`."""
    scale = np.array([width / annotation.width, height / annotation.height] * 2, dtype=np.float32)
    single = ~annotation.crowd
    boxes = annotation.boxes[single] * scale
    labels = np.array([classes.index(name) for name in annotation.names], dtype=np.int64)
    points = None
    if annotation.keypoints is not None:
        points = annotation.keypoints[single].astype(np.float32)
        # COCO's numbers index a pixel, whose centre is half a pixel further.
        points[..., :2] = (points[..., :2] + 0.5) * scale[:2]
    if flip:
        boxes = flip_boxes(boxes, width)
        if points is not None:
            points[..., 0] = width - points[..., 0]
            points = points[:, list(flips)]
    return Target(
        torch.from_numpy(boxes),
        torch.from_numpy(labels[single]),
        keypoints=None if points is None else torch.from_numpy(points),
    )


def collate(samples: list[ImageBatch[TargetT]]) -> ImageBatch[TargetT]:
    """One batch of the images of several."""
    return ImageBatch(
        [image for sample in samples for image in sample.images],
        [target for sample in samples for target in sample.targets],
    )
