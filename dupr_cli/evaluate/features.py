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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dupr_cli.artifacts.files import atomic_file, remove_leftovers
from dupr_cli.datasets.labelled import Annotation, LabelledSet
from dupr_cli.errors import RunError
from dupr_cli.evaluate.detection_data import FeatureBatch, collate
from dupr_cli.evaluate.detector_data import ImageMaps
from dupr_cli.evaluate.tasks import Request, Task, task_of
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights
from dupr_cli.models.frozen import FrozenBackbone, freeze, normalised_batch
from dupr_cli.progress import Reporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.base import LEVEL_STRIDES, Level
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
        size: Callable[[Annotation], tuple[int, int]],
        levels: Mapping[Level, tuple[int, int]],
        mirrored: bool,
    ) -> None:
        """file: read at the first use. size: width and height of an image, pixels. levels: channels
        and stride of each. mirrored: each image is followed by its mirror image."""
        self.file, self.mirrored = file, mirrored
        self._levels, self._places, offset = levels, {}, 0
        for annotation in images.annotations:
            width, height = size(annotation)
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
            level: (channels, height // stride, width // stride)
            for level, (channels, stride) in self._levels.items()
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
        task = task_of(recipe)
        for requests in task.order(images, seed, start):
            maps, targets = [], []
            for request in requests:
                of_image = self.train.maps(images.ids[request.position], request.flip)
                size = of_image.size[::-1]
                maps.append(of_image)
                targets.append(task.target(images, request.position, classes, size, request.flip))
            yield FeatureBatch(maps, targets)

    def test_batches(self, images: LabelledSet) -> Generator[FeatureBatch, None, None]:
        """One image at a time, in order, without targets."""
        for image_id in images.ids:
            yield FeatureBatch([self.test.maps(image_id)], [])


def measured_batches(recipe: EvaluateRecipe, images: LabelledSet) -> int:
    """Over how many batches of the training images batch norm is measured, once per weights."""
    whole = max(1, len(images) // recipe.train.batch_size)
    return min(recipe.test.precise_bn_batches, whole)


def training_pixels(
    recipe: EvaluateRecipe, images: LabelledSet, classes: Sequence[str], count: int
) -> Iterator[list[torch.Tensor]]:
    """`count` batches of resized training images (C, H, W), the same for all weights."""
    task = task_of(recipe)
    requests = list(islice(task.order(images, seed=0), count))
    read = task.loading(images, classes, labelled=False)
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
    task, data = task_of(recipe), recipe.data
    precision = getattr(torch, recipe.train.precision)
    backbone = freeze(compared, recipe.seed, device, precision, recipe.dilates)
    shape = backbone.shape
    levels = {level: (shape.channels[level], shape.strides[level]) for level in task.levels}
    known = {
        "weights": compared.sha256 or f"{RANDOM_WEIGHTS}, seed {recipe.seed}",
        "architecture": compared.architecture,
        "levels": levels,
        "batch norm": [labelled.digest, data.train_sizes, measured_batches(recipe, labelled)],
        "batches": [recipe.train.batch_size, data.flip, data.group_by_aspect],
        "max_size": data.max_size,
        "square": data.square,
        "precision": recipe.train.precision,
        "device": device.type,
        **({"short side": recipe.semantic.short_side} if recipe.is_semantic else {}),
        **({"pixels": str(train.pixels)} if train.pixels else {}),
    }

    def of(images: LabelledSet, training: bool) -> FeatureSet:
        mirrored, side = training and data.flip, data.train_sizes[0] if training else data.test_size
        facts = {**known, "images": images.digest, "side": side, "mirrored": mirrored}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = folder / f"{digest[:24]}{_SUFFIX}"
        return FeatureSet(file, images, partial(task.size, training=training), levels, mirrored)

    found = Features(backbone, of(train, training=True), of(test, training=False))
    missing = [
        (kind, features, images)
        for kind, features, images in (
            ("training", found.train, train),
            ("test", found.test, test),
        )
        if not features.is_whole()
    ]
    wanted = sum(features.bytes for _, features, _ in missing)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise RunError(
            f"{folder}: No space left on device for the features of {compared.address}: they take "
            f"{wanted / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free. Free some space, or "
            f"give --out on a larger disk, or fewer or smaller images."
        )
    if missing:
        count = measured_batches(recipe, labelled)
        with reporter.task(f"batch norm {compared.folder}", count, "batches") as progress:

            def normalised() -> Iterator[torch.Tensor]:
                for images in training_pixels(recipe, labelled, classes, count):
                    raise_if_stopped()
                    yield _normalised(images, backbone)
                    progress.advance()

            backbone.measure_on_normalised(normalised())
    for kind, features, images in missing:
        name = f"{kind} features {compared.folder}"
        requests = [task.whole(position, kind == "training") for position in range(len(images))]
        _compute(features, images, requests, task, recipe, backbone, name, reporter)
    return found


def _normalised(images: Sequence[torch.Tensor], backbone: FrozenBackbone) -> torch.Tensor:
    mean, std = backbone.mean.view(-1, 1, 1), backbone.std.view(-1, 1, 1)
    return normalised_batch(images, mean, std, _MULTIPLE)


def _compute(
    features: FeatureSet,
    images: LabelledSet,
    requests: Sequence[Request],
    task: Task,
    recipe: EvaluateRecipe,
    backbone: FrozenBackbone,
    name: str,
    reporter: Reporter,
) -> None:
    """Compute the features of all images into their file. name: for progress and messages."""
    read = task.loading(images, images.classes, labelled=False)
    one_by_one = [[request] for request in requests]
    with (
        atomic_file(features.file) as file,
        reporter.task(name, len(images), "images") as progress,
        closing(load(read, collate, one_by_one, recipe.train.workers)) as batches,
    ):
        for image_id, batch in zip(images.ids, batches, strict=True):
            raise_if_stopped()
            (pixels,) = batch.images
            views = [pixels, pixels.flip(2)] if features.mirrored else [pixels]
            maps = backbone.maps_of_normalised(_normalised(views, backbone), task.levels)
            for view in range(len(views)):
                for level in task.levels:
                    values = maps[level][view].half().cpu().contiguous()
                    if not bool(values.isfinite().all()):
                        raise RunError(
                            f"{name}: those of {image_id} at {level} are not finite, or "
                            f"larger than half precision holds. The weights are damaged, or their "
                            f"batch norm was never trained."
                        )
                    file.write(values.numpy().tobytes())
            progress.advance()


def feature_files(folder: Path) -> list[Path]:
    """The feature files in a folder; they are needed only until all trials are finished."""
    return sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
