"""What differs between the tasks that weights are compared on: finding objects, and giving every
pixel a class.

The comparison, its trials, their training and stored features are the same for all tasks; they ask
a `Task` for the data, the outputs and the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.datasets.labelled import Annotation, LabelledSet, open_labelled
from dupr_cli.datasets.semantic import SemanticSet, open_semantic
from dupr_cli.errors import UsageError
from dupr_cli.evaluate import detection_pictures, pictures
from dupr_cli.evaluate.cell_scores import CellScores
from dupr_cli.evaluate.class_maps import (
    PREDICTIONS_FILE,
    Prediction,
    class_map,
    class_map_by_windows,
    counted_all,
    read_predictions,
    write_predictions,
)
from dupr_cli.evaluate.detection_data import (
    Batch,
    ImageBatch,
    ImageLoading,
    ImageRequest,
    PartOfBatches,
    SemanticBatch,
    TrainingOrder,
    collate,
    keypoint_flips,
    resized_size,
    resized_target,
)
from dupr_cli.evaluate.detector_data import (
    DENSE_LEVELS,
    SEMANTIC_LEVELS,
    AnyTarget,
    HeadOutput,
    SemanticTarget,
)
from dupr_cli.evaluate.inference import in_source_pixels
from dupr_cli.evaluate.results_table import detection_rows, detections_from_rows
from dupr_cli.evaluate.semantic_data import (
    SemanticLoading,
    SemanticOrder,
    SemanticRequest,
    resized_mask,
    whole_size,
)
from dupr_cli.metrics import COCO_SIGMAS, METRIC_NAMES, Detections, Metric, Points, Scores, score
from dupr_cli.metrics.analysis import analyse
from dupr_cli.metrics.drawing import write_analysis, write_semantic_analysis
from dupr_cli.metrics.semantic import METRIC_NAME, semantic_scores
from dupr_cli.parsing import parse_json
from dupr_cli.progress import Reporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.base import Level
from dupr_cli.runtime.loader import load
from dupr_cli.runtime.parallel import World

Found = Detections | Prediction
Request = ImageRequest | SemanticRequest


class Task(Protocol):
    """One task with one recipe.

    levels: whose features of a frozen backbone the head takes. metric_name: in words. found_file:
    what a trial keeps of its test. picture: file of the pictures of an evaluation.
    """

    levels: tuple[Level, ...]
    metric_name: str
    found_file: str
    picture: str

    def open(
        self,
        address: str,
        splits: Sequence[str],
        pixels: PixelFormat | None,
        reporter: Reporter,
    ) -> LabelledSet: ...

    def classes(self, train: LabelledSet, test: LabelledSet) -> list[str]:
        """Names by class number. Raises UsageError when those of the sets do not fit."""
        ...

    def order(self, images: LabelledSet, seed: int, start: int = 0) -> Iterable[Sequence[Request]]:
        """The endless batches of requests of all iterations from `start` on."""
        ...

    def whole(self, position: int, training: bool) -> Request:
        """The request of an image that is tested, or whose features are stored for training."""
        ...

    def size(self, annotation: Annotation, training: bool) -> tuple[int, int]:
        """Width and height of the image of `whole`, pixels."""
        ...

    # A loading takes the requests of its own task, and gives batches of it.
    def loading(
        self, images: LabelledSet, classes: Sequence[str], labelled: bool
    ) -> Callable[[Any], ImageBatch[Any]]:
        """Reads the image of a request, with its target if it is `labelled`."""
        ...

    def target(
        self,
        images: LabelledSet,
        position: int,
        classes: Sequence[str],
        size: tuple[int, int],
        flip: bool,
    ) -> AnyTarget:
        """The target of an image whose features are stored. size: width and height, pixels."""
        ...

    # A trial's network and batches are those of its task.
    def output(self, network: Any, batch: Batch, annotation: Annotation) -> Found:
        """What the network finds in a batch of one image, in pixels of that image."""
        ...

    # What was found is of the task's own kind.
    def scores(self, test: LabelledSet, classes: Sequence[str], found: Any) -> Scores: ...

    def write(
        self, folder: Path, found: Any, test: LabelledSet, classes: Sequence[str]
    ) -> None: ...

    def read(self, folder: Path, test: LabelledSet, classes: Sequence[str]) -> Sequence[Found]:
        """Raises OSError, ValueError, TypeError or KeyError for a file that is damaged."""
        ...

    def draw(
        self,
        path: Path,
        test: LabelledSet,
        classes: Sequence[str],
        found: Mapping[str, Any],
        count: int,
    ) -> None:
        """A picture of `count` images beside what was found with each of the weights, by name."""
        ...

    def analyse(self, folder: Path, test: LabelledSet, classes: Sequence[str], found: Any) -> None:
        """Write what is behind the metric, `drawing.ANALYSIS_FILES` or some of them."""
        ...


def task_of(recipe: EvaluateRecipe) -> Task:
    return Segmentation(recipe) if recipe.is_semantic else Detection(recipe)


def training_batches(
    images: LabelledSet,
    recipe: EvaluateRecipe,
    classes: Sequence[str],
    seed: int,
    start: int,
    world: World,
) -> Generator[ImageBatch[Any], None, None]:
    """This process's part of the batches of all iterations from `start` on; endless."""
    task = task_of(recipe)
    order = PartOfBatches(task.order(images, seed, start), world)
    read = task.loading(images, classes, True)
    return load(read, collate, order, recipe.train.workers, world.device)


def test_batches(
    images: LabelledSet,
    recipe: EvaluateRecipe,
    classes: Sequence[str],
    positions: Sequence[int],
    world: World,
) -> Generator[ImageBatch[Any], None, None]:
    """One image at a time, in order: padding to the size of others would change the result."""
    task = task_of(recipe)
    requests = [[task.whole(position, training=False)] for position in positions]
    read = task.loading(images, classes, False)
    return load(read, collate, requests, recipe.train.workers, world.device)


def _keypoint_sigmas(
    recipe: EvaluateRecipe, test: LabelledSet, classes: Sequence[str]
) -> Sequence[float] | Mapping[str, Sequence[float]]:
    """Those of the recipe, or COCO's. Raises UsageError when they do not fit the set."""
    given, count = recipe.test.keypoint_sigmas, test.keypoint_count
    if given is None and count == len(COCO_SIGMAS):
        return COCO_SIGMAS
    lists = given.values() if isinstance(given, dict) else [given or []]
    missing = sorted(set(classes) - given.keys()) if isinstance(given, dict) else []
    if given is None or missing or any(len(each) != count for each in lists):
        raise UsageError(
            f"test.keypoint_sigmas: objects of {test.address} have {count} keypoints; give "
            f"{count} numbers, for all classes or for each of {', '.join(classes)}; 1/{count} for "
            f"each is usual where nothing was measured. (recipe key: test.keypoint_sigmas)"
        )
    return given


def _metric_of(recipe: EvaluateRecipe) -> Metric:
    if recipe.has_keypoints:
        return "coco-keypoints"
    if not recipe.has_masks:
        return cast(Metric, recipe.test.metric)  # one of detectors, which the recipe checks
    return "cityscapes" if recipe.protocol == "cityscapes" else "coco-segm"


class Detection:
    """Objects as boxes, and masks if the detector has them; see `Task`."""

    levels = DENSE_LEVELS
    found_file = "detections.json"
    picture = "detections.png"

    def __init__(self, recipe: EvaluateRecipe) -> None:
        self._recipe = recipe
        self._metric = _metric_of(recipe)
        self.metric_name = METRIC_NAMES[self._metric]

    def open(
        self,
        address: str,
        splits: Sequence[str],
        pixels: PixelFormat | None,
        reporter: Reporter,
    ) -> LabelledSet:
        masks, keypoints = self._recipe.has_masks, self._recipe.has_keypoints
        return open_labelled(
            address, splits, reporter, masks=masks, keypoints=keypoints, pixels=pixels
        )

    def classes(self, train: LabelledSet, test: LabelledSet) -> list[str]:
        names = sorted({*train.classes, *test.classes})
        if self._recipe.has_keypoints:
            keypoint_flips(train, self._recipe.data)
            _keypoint_sigmas(self._recipe, test, names)
        return names

    def order(self, images: LabelledSet, seed: int, start: int = 0) -> TrainingOrder:
        return TrainingOrder(images, self._recipe, seed, start)

    def whole(self, position: int, training: bool) -> ImageRequest:
        return ImageRequest(position, self._side(training))

    def size(self, annotation: Annotation, training: bool) -> tuple[int, int]:
        width, height = annotation.width, annotation.height
        return resized_size(width, height, self._side(training), self._recipe.data)

    def _side(self, training: bool) -> int:
        data = self._recipe.data
        return data.train_sizes[0] if training else data.test_size

    def loading(self, images: LabelledSet, classes: Sequence[str], labelled: bool) -> ImageLoading:
        masks = labelled and self._recipe.has_masks
        return ImageLoading(images, self._recipe.data, classes, masks)

    def target(
        self,
        images: LabelledSet,
        position: int,
        classes: Sequence[str],
        size: tuple[int, int],
        flip: bool,
    ) -> AnyTarget:
        return resized_target(images.annotations[position], classes, *size, flip)

    def output(self, network: Any, batch: Batch, annotation: Annotation) -> Detections:
        detections: HeadOutput
        (detections,) = network.detect(batch.images)
        ((height, width),) = batch.sizes
        return in_source_pixels(detections, annotation, width, height)

    def scores(
        self, test: LabelledSet, classes: Sequence[str], found: Sequence[Detections]
    ) -> Scores:
        truths = [test.truth(i, classes) for i in range(len(test))]
        sigmas: Sequence[float] | Mapping[str, Sequence[float]] = COCO_SIGMAS
        if self._recipe.has_keypoints:
            sigmas = _keypoint_sigmas(self._recipe, test, classes)
        return score(self._metric, truths, found, classes, sigmas=sigmas)

    def write(
        self,
        folder: Path,
        found: Sequence[Detections],
        test: LabelledSet,
        classes: Sequence[str],
    ) -> None:
        write_text(folder / self.found_file, detection_rows(found, test.ids, classes))

    def read(self, folder: Path, test: LabelledSet, classes: Sequence[str]) -> list[Detections]:
        # Masks of COCO's images are hundreds of megabytes, and the file is our own.
        rows = parse_json((folder / self.found_file).read_bytes())
        return detections_from_rows(rows, test.ids, classes)

    def draw(
        self,
        path: Path,
        test: LabelledSet,
        classes: Sequence[str],
        found: Mapping[str, Sequence[Detections]],
        count: int,
    ) -> None:
        detection_pictures.draw_detections(path, test, classes, found, count)

    def analyse(
        self,
        folder: Path,
        test: LabelledSet,
        classes: Sequence[str],
        found: Sequence[Detections],
    ) -> None:
        truths = [test.truth(i, classes) for i in range(len(test))]
        points: Points = "voc07" if self._recipe.test.metric == "voc07" else "voc10"
        write_analysis(folder, analyse(truths, found, classes, points))


class Segmentation:
    """A class for every pixel; see `Task`."""

    levels = SEMANTIC_LEVELS
    metric_name = METRIC_NAME
    found_file = PREDICTIONS_FILE
    picture = "predictions.png"

    def __init__(self, recipe: EvaluateRecipe) -> None:
        self._recipe = recipe

    def open(
        self,
        address: str,
        splits: Sequence[str],
        pixels: PixelFormat | None,
        reporter: Reporter,
    ) -> LabelledSet:
        return open_semantic(address, splits, reporter, pixels=pixels)

    def classes(self, train: LabelledSet, test: LabelledSet) -> list[str]:
        """The longer list: without names in the data, a set has those up to its highest number."""
        lists = sorted((train.classes, test.classes), key=len)
        if lists[1][: len(lists[0])] != lists[0]:
            raise UsageError(
                f"{train.address}: the splits {train.split} and {test.split} have different "
                f"classes: {', '.join(lists[0])}, and {', '.join(lists[1])}."
            )
        if len(lists[1]) < 2:
            raise UsageError(
                f"{train.address}: the masks show a single class, {lists[1][0]}, so there is "
                f"nothing to tell apart. 255 means not labelled; give a foreground the number 1."
            )
        return lists[1]

    def order(self, images: LabelledSet, seed: int, start: int = 0) -> SemanticOrder:
        return SemanticOrder(len(images), self._recipe, seed, start, self._recipe.is_frozen)

    def whole(self, position: int, training: bool) -> SemanticRequest:
        return SemanticRequest(position)

    def size(self, annotation: Annotation, training: bool) -> tuple[int, int]:
        return whole_size(annotation, self._recipe)

    def loading(
        self, images: LabelledSet, classes: Sequence[str], labelled: bool
    ) -> SemanticLoading:
        return SemanticLoading(cast(SemanticSet, images), self._recipe, labelled)

    def target(
        self,
        images: LabelledSet,
        position: int,
        classes: Sequence[str],
        size: tuple[int, int],
        flip: bool,
    ) -> AnyTarget:
        mask = resized_mask(cast(SemanticSet, images), position, size)
        return SemanticTarget(torch.from_numpy(mask[:, ::-1].copy() if flip else mask))

    def output(self, network: Any, batch: Batch, annotation: Annotation) -> Prediction:
        size, window = (annotation.height, annotation.width), self._recipe.semantic.window
        if window is not None:
            (image,) = cast(SemanticBatch, batch).images
            return class_map_by_windows(network.detect, image, window, size)
        scores: CellScores
        (scores,) = network.detect(batch.images)
        return class_map(scores, size)

    def scores(
        self, test: LabelledSet, classes: Sequence[str], found: Sequence[Prediction]
    ) -> Scores:
        return semantic_scores(counted_all(test, found, len(classes)), classes)

    def write(
        self,
        folder: Path,
        found: Sequence[Prediction],
        test: LabelledSet,
        classes: Sequence[str],
    ) -> None:
        write_predictions(folder, found, test.ids)

    def read(self, folder: Path, test: LabelledSet, classes: Sequence[str]) -> list[Prediction]:
        return read_predictions(folder, test.ids)

    def draw(
        self,
        path: Path,
        test: LabelledSet,
        classes: Sequence[str],
        found: Mapping[str, Sequence[Prediction]],
        count: int,
    ) -> None:
        pictures.draw_class_maps(path, cast(SemanticSet, test), classes, found, count)

    def analyse(
        self,
        folder: Path,
        test: LabelledSet,
        classes: Sequence[str],
        found: Sequence[Prediction],
    ) -> None:
        write_semantic_analysis(folder, counted_all(test, found, len(classes)), classes)
