"""What the detector sees: images resized and flipped with their boxes, in batches.

Every batch is a pure function of (seed, iteration): its images, their flips and its short side. So
all compared weights train on the same batches, with any number of loader workers. Images are
resized with Pillow's antialiased bilinear filter, as the protocol's loader does, and stay uint8
until they are on the training device.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dupr_cli.evaluate.labelled import LabelledSet
from dupr_cli.recipe.evaluate import DetectionDataSection, EvaluateRecipe

# Streams of random numbers, told apart by the last word of their seed.
_ORDER, _FLIP, _SIZE, _SUBSET = range(4)


@dataclass(frozen=True)
class Batch:
    """Images of one step, with their objects.

    images: (3, H, W) uint8 each. boxes: (n, 4) float32 in pixels of that image. labels: (n,) int64,
    class number from 0.
    """

    images: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]

    def pin_memory(self) -> Batch:
        """Called by the loader for a CUDA device."""
        return Batch([image.pin_memory() for image in self.images], self.boxes, self.labels)


@dataclass(frozen=True)
class Request:
    """One image of a batch: its position in the set, and what is done to it."""

    position: int
    short_side: int
    flip: bool = False


def resized_size(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Width and height with the short side as asked for, unless the long one exceeds max_size."""
    scale = min(short_side / min(width, height), max_size / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def flip_boxes(boxes: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """(n, 4) boxes of an image mirrored left to right; pixel edges, so width - x is exact."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def training_positions(images: LabelledSet, recipe: EvaluateRecipe) -> list[int]:
    """Images to train on, in the order of the split: those with objects, or data.train_images.

    Images without objects are left out, as the protocol does; they would train the background only.
    """
    positions = [i for i, annotation in enumerate(images.annotations) if annotation.names]
    wanted = recipe.data.train_images
    if wanted is None or wanted >= len(positions):
        return positions
    random = np.random.default_rng([recipe.seed, _SUBSET])
    return sorted(random.choice(positions, wanted, replace=False).tolist())


class TrainingOrder:
    """The requests of every iteration, without end.

    Images that do not fill a batch at the end of an epoch start the next one: nothing is dropped.
    """

    def __init__(self, images: int, recipe: EvaluateRecipe) -> None:
        self._images, self._recipe = images, recipe

    def __iter__(self) -> Iterator[list[Request]]:
        seed, data = self._recipe.seed, self._recipe.data
        order, flips = self._epoch(0)
        position = iteration = 0
        while True:
            sizes = np.random.default_rng([seed, iteration, _SIZE])
            short_side = int(sizes.choice(data.train_sizes))
            batch: list[Request] = []
            while len(batch) < self._recipe.train.batch_size:
                epoch, place = divmod(position, self._images)
                if position and place == 0:
                    order, flips = self._epoch(epoch)
                batch.append(Request(int(order[place]), short_side, bool(flips[place])))
                position += 1
            yield batch
            iteration += 1

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        seed = self._recipe.seed
        order = np.random.default_rng([seed, epoch, _ORDER]).permutation(self._images)
        flips = np.random.default_rng([seed, epoch, _FLIP]).random(self._images) < 0.5
        return order, flips & self._recipe.data.flip


class ImageLoading(Dataset[Batch]):
    """Decodes, resizes and flips the image of a request."""

    def __init__(
        self, images: LabelledSet, data: DetectionDataSection, classes: Sequence[str]
    ) -> None:
        self._images, self._data, self._classes = images, data, classes

    def __getitem__(self, request: Request) -> Batch:
        """Raises RunError naming the image when it cannot be read."""
        image = self._images.image(request.position)
        truth = self._images.truth(request.position, self._classes)
        width, height = resized_size(
            image.width, image.height, request.short_side, self._data.max_size
        )
        scale = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
        boxes = truth.boxes.astype(np.float32) * scale
        # A copy: torch does not take the read-only memory of Pillow.
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        if request.flip:
            pixels, boxes = pixels[:, ::-1].copy(), flip_boxes(boxes, width)
        return Batch(
            [torch.from_numpy(pixels).permute(2, 0, 1)],
            [torch.from_numpy(boxes)],
            [torch.from_numpy(truth.labels)],
        )


def _collate(samples: list[Batch]) -> Batch:
    return Batch(
        [image for sample in samples for image in sample.images],
        [boxes for sample in samples for boxes in sample.boxes],
        [labels for sample in samples for labels in sample.labels],
    )


def _ignore_interrupt(_worker: int) -> None:
    # Control-C reaches the whole process group, and is the main process's to handle. Not SIGTERM:
    # with it Python ends workers that are left at exit, and waits for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(
    images: LabelledSet,
    recipe: EvaluateRecipe,
    classes: Sequence[str],
    requests: TrainingOrder | list[list[Request]],
    pin_memory: bool,
) -> DataLoader[Batch]:
    return DataLoader(
        ImageLoading(images, recipe.data, classes),
        batch_sampler=requests,
        num_workers=recipe.train.workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupt,
    )


def training_batches(
    images: LabelledSet, recipe: EvaluateRecipe, classes: Sequence[str], pin_memory: bool
) -> DataLoader[Batch]:
    """Batches of all iterations, without end; see `TrainingOrder`."""
    return _loader(images, recipe, classes, TrainingOrder(len(images), recipe), pin_memory)


def test_batches(
    images: LabelledSet, recipe: EvaluateRecipe, classes: Sequence[str], pin_memory: bool
) -> DataLoader[Batch]:
    """One image at a time, in order: in a batch the padding of its neighbours would change it."""
    requests = [[Request(position, recipe.data.test_size)] for position in range(len(images))]
    return _loader(images, recipe, classes, requests, pin_memory)
