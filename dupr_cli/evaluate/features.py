"""Features of a frozen backbone: computed once per image, kept on disk, shared by all trials.

    OUT/features/<digest>.f16    maps of all levels of one image after the other, float16

The digest covers weights, images, sizes, levels and how batch norm was measured, so that features
are never taken for others. Every image passes the backbone alone (with its mirror image, in
training): its features do not depend on which other images are wanted. Files are memory-mapped,
so that sets larger than the memory can be used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dupr_cli.artifacts.files import atomic_file, remove_leftovers
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.errors import RunError
from dupr_cli.evaluate.detection_data import (
    FeatureBatch,
    ImageLoading,
    ImageRequest,
    TrainingOrder,
    collate,
    resized_size,
    resized_target,
)
from dupr_cli.evaluate.detector_data import DENSE_LEVELS, ImageMaps
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights
from dupr_cli.models.frozen import FrozenBackbone, freeze, normalised_batch
from dupr_cli.progress import Reporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.base import LEVEL_STRIDES, Level
from dupr_cli.recipe.evaluate import DetectionDataSection
from dupr_cli.runtime.loader import load
from dupr_cli.runtime.stopping import raise_if_stopped

FEATURES_FOLDER = "features"
_SUFFIX = ".f16"
_MULTIPLE = LEVEL_STRIDES["res5"]
_BYTES = 2


@dataclass(frozen=True)
class _Place:
    """Where an image's maps are in a file. offset: in values. size: height and width, pixels."""

    offset: int
    size: tuple[int, int]


class FeatureSet:
    """The stored maps of the images of a set, by image id."""

    def __init__(
        self,
        file: Path,
        images: LabelledSet,
        short_side: int,
        data: DetectionDataSection,
        channels: Mapping[Level, int],
        mirrored: bool,
    ) -> None:
        """file: read at the first use. mirrored: each image is followed by its mirror image."""
        self.file, self.mirrored = file, mirrored
        self._channels, self._places, offset = channels, {}, 0
        for annotation in images.annotations:
            width, height = resized_size(annotation.width, annotation.height, short_side, data)
            self._places[annotation.image_id] = _Place(offset, (height, width))
            offset += self._values((height, width)) * (2 if mirrored else 1)
        self.values = offset
        self._mapped: np.memmap[tuple[int], np.dtype[np.float16]] | None = None

    @property
    def bytes(self) -> int:
        return self.values * _BYTES

    def shapes(self, size: tuple[int, int]) -> dict[Level, tuple[int, int, int]]:
        """(C, h, w) of the maps of an image of (height, width) pixels, padded."""
        height, width = (-(-side // _MULTIPLE) * _MULTIPLE for side in size)
        return {
            level: (
                self._channels[level],
                height // LEVEL_STRIDES[level],
                width // LEVEL_STRIDES[level],
            )
            for level in DENSE_LEVELS
        }

    def _values(self, size: tuple[int, int]) -> int:
        return sum(c * h * w for c, h, w in self.shapes(size).values())

    def is_whole(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.bytes

    def maps(self, image_id: str, flip: bool = False) -> ImageMaps:
        """The maps of an image, or of its mirror image."""
        if self._mapped is None:
            self._mapped = np.memmap(self.file, np.float16, "r")
        place = self._places[image_id]
        first = place.offset + (self._values(place.size) if flip else 0)
        found = {}
        for level, shape in self.shapes(place.size).items():
            count = int(np.prod(shape))
            values = np.array(self._mapped[first : first + count])
            found[level] = torch.from_numpy(values).view(shape)
            first += count
        return ImageMaps(found, place.size)


@dataclass(frozen=True)
class Features:
    """What the trials of one of the weights share: its backbone and both sets of features."""

    backbone: FrozenBackbone
    train: FeatureSet
    test: FeatureSet

    def training_batches(
        self,
        images: LabelledSet,
        recipe: EvaluateRecipe,
        classes: Sequence[str],
        seed: int,
        start: int,
    ) -> Generator[FeatureBatch, None, None]:
        """The batches of all iterations from `start` on, as of images; endless."""
        for requests in TrainingOrder(images, recipe, seed, start):
            yield _batch(self.train, images, requests, classes)

    def test_batches(
        self, images: LabelledSet, classes: Sequence[str]
    ) -> Generator[FeatureBatch, None, None]:
        """One image at a time, in order."""
        for position in range(len(images)):
            yield _batch(self.test, images, [ImageRequest(position, 0)], classes)


def _batch(
    features: FeatureSet,
    images: LabelledSet,
    requests: Sequence[ImageRequest],
    classes: Sequence[str],
) -> FeatureBatch:
    maps, targets = [], []
    for request in requests:
        annotation = images.annotations[request.position]
        of_image = features.maps(annotation.image_id, request.flip)
        height, width = of_image.size
        maps.append(of_image)
        targets.append(resized_target(annotation, classes, width, height, request.flip))
    return FeatureBatch(maps, targets)


def measured_batches(recipe: EvaluateRecipe, images: LabelledSet) -> int:
    """Over how many batches of the training images batch norm is measured, once per weights."""
    whole = max(1, len(images) // recipe.train.batch_size)
    return min(recipe.test.precise_bn_batches, whole)


def training_pixels(
    recipe: EvaluateRecipe, images: LabelledSet, classes: Sequence[str], count: int
) -> Iterator[list[torch.Tensor]]:
    """`count` batches of resized training images (C, H, W), the same for all weights."""
    order = TrainingOrder(images, recipe, seed=0)
    requests = [batch for _, batch in zip(range(count), order, strict=False)]
    read = ImageLoading(images, recipe.data, classes, masks=False)
    with closing(load(read, collate, requests, recipe.train.workers)) as batches:
        for batch in batches:
            yield batch.images


def open_features(
    folder: Path,
    compared: ComparedWeights,
    recipe: EvaluateRecipe,
    labelled: LabelledSet,
    train: LabelledSet,
    test: LabelledSet,
    classes: Sequence[str],
    device: torch.device,
    reporter: Reporter,
) -> Features:
    """The features of training and test images, computed now unless an earlier call did.

    labelled: all labelled training images, over which batch norm is measured: so the features do
    not depend on the number of labels. train: those that any trial needs.
    Raises RunError for an image that cannot be read, features that are not finite, or too little
    space on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    backbone = freeze(compared, recipe.seed, device, getattr(torch, recipe.train.precision))
    channels = {level: backbone.shape.channels[level] for level in DENSE_LEVELS}
    data = recipe.data
    known = {
        "weights": compared.sha256 or f"{RANDOM_WEIGHTS}, seed {recipe.seed}",
        "architecture": compared.architecture,
        "levels": list(DENSE_LEVELS),
        "batch norm": [labelled.digest, data.train_sizes, measured_batches(recipe, labelled)],
        "batches": [recipe.train.batch_size, data.flip, data.group_by_aspect],
        "max_size": data.max_size,
        "square": data.square,
        "precision": recipe.train.precision,
        "device": device.type,
        **({"pixels": str(train.pixels)} if train.pixels else {}),
    }

    def of(images: LabelledSet, side: int, mirrored: bool) -> FeatureSet:
        facts = {**known, "images": images.digest, "side": side, "mirrored": mirrored}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = folder / f"{digest[:24]}{_SUFFIX}"
        return FeatureSet(file, images, side, data, channels, mirrored)

    found = Features(
        backbone,
        of(train, data.train_sizes[0], data.flip),
        of(test, data.test_size, mirrored=False),
    )
    missing = [
        (kind, features, images, side)
        for kind, features, images, side in (
            ("training", found.train, train, data.train_sizes[0]),
            ("test", found.test, test, data.test_size),
        )
        if not features.is_whole()
    ]  # fmt: skip
    wanted, free = (
        sum(features.bytes for _, features, _, _ in missing),
        shutil.disk_usage(folder).free,
    )
    if wanted > free:
        raise RunError(
            f"{folder}: No space left on device for the features of {compared.address}: they take "
            f"{wanted / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free. Free some space, or "
            f"give --out on a larger disk, or fewer or smaller images."
        )
    if missing:
        count = measured_batches(recipe, labelled)
        with reporter.task(f"batch norm {compared.folder}", count, "batches") as task:

            def normalised() -> Iterator[torch.Tensor]:
                for images in training_pixels(recipe, labelled, classes, count):
                    raise_if_stopped()
                    yield _normalised(images, backbone)
                    task.advance()

            backbone.measure_on_normalised(normalised())
    for kind, features, images, side in missing:
        name = f"{kind} features {compared.folder}"
        _compute(features, images, side, recipe, backbone, name, reporter)
    return found


def _normalised(images: Sequence[torch.Tensor], backbone: FrozenBackbone) -> torch.Tensor:
    mean, std = backbone.mean.view(-1, 1, 1), backbone.std.view(-1, 1, 1)
    return normalised_batch(images, mean, std, _MULTIPLE)


def _compute(
    features: FeatureSet,
    images: LabelledSet,
    side: int,
    recipe: EvaluateRecipe,
    backbone: FrozenBackbone,
    name: str,
    reporter: Reporter,
) -> None:
    """Compute the features of all images into their file. name: for progress and messages."""
    requests = [[ImageRequest(position, side)] for position in range(len(images))]
    read = ImageLoading(images, recipe.data, images.classes, masks=False)
    with (
        atomic_file(features.file) as file,
        reporter.task(name, len(images), "images") as task,
        closing(load(read, collate, requests, recipe.train.workers)) as batches,
    ):
        for image_id, batch in zip(images.ids, batches, strict=True):
            raise_if_stopped()
            (pixels,) = batch.images
            views = [pixels, pixels.flip(2)] if features.mirrored else [pixels]
            maps = backbone.maps_of_normalised(_normalised(views, backbone), DENSE_LEVELS)
            for view in range(len(views)):
                for level in DENSE_LEVELS:
                    values = maps[level][view].half().cpu().contiguous()
                    if not bool(values.isfinite().all()):
                        raise RunError(
                            f"{name}: those of {image_id} at {level} are not finite, or "
                            f"larger than half precision holds. The weights are damaged, or their "
                            f"batch norm was never trained."
                        )
                    file.write(values.numpy().tobytes())
            task.advance()


def feature_files(folder: Path) -> list[Path]:
    """The feature files in a folder; they are needed only until all trials are finished."""
    return sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
