"""Batches: boxes follow the pixels, and the order is a function of seed and iteration alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.detection_data import (
    DetectionBatch,
    ImageLoading,
    ImageRequest,
    TrainingOrder,
    resized_size,
)
from dupr_cli.evaluate.detectors import Detector, HeadOutput
from dupr_cli.evaluate.inference import find_all
from dupr_cli.evaluate.subsets import choose_labels
from dupr_cli.evaluate.tasks import Detection, training_batches
from dupr_cli.evaluate.tasks import test_batches as in_batches
from dupr_cli.metrics import score
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.runtime.parallel import World
from tests.support.labelled_scenes import COLOURS, add_image, add_split, make_tree

CLASSES = sorted(COLOURS)
ALONE = World(torch.device("cpu"))


def recipe(**data: object) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate(
        {
            "data": {"train_sizes": [72, 90], "test_size": 100, "max_size": 200, **data},
            "train": {"batch_size": 3, "workers": 0},
        }
    )


def opened(tree: Path, split: str = "train") -> LabelledSet:
    return open_labelled(str(tree), [split], SilentReporter())


def rectangles(image: torch.Tensor) -> dict[str, list[float]]:
    """Where the colours of the scenes are in (3, H, W), to the half pixel that resizing blurs."""
    found = {}
    for name, colour in COLOURS.items():
        distance = (image.float() - torch.tensor(colour).view(3, 1, 1)).abs().amax(0)
        rows, columns = np.nonzero(distance.numpy() < 60)
        if len(rows):
            found[name] = [
                float(columns.min()),
                float(rows.min()),
                float(columns.max() + 1),
                float(rows.max() + 1),
            ]
    return found


class ColourOracle(torch.nn.Module):
    """A detector that knows the scenes: what it finds comes from the pixels it is given."""

    def detect(self, images: list[torch.Tensor]) -> list[HeadOutput]:
        found = rectangles(images[0])
        return [
            HeadOutput(
                torch.tensor(list(found.values())).reshape(-1, 4),
                torch.tensor([CLASSES.index(name) for name in found]),
                torch.ones(len(found)),
            )
        ]


def test_oracle_scores_100_through_resize_and_back(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path, val=8), "val")
    # Eight times the size: what blurs at the edges is small against IoU 0.95.
    sizes = recipe(test_size=576, max_size=1000)
    batches = in_batches(images, sizes, CLASSES, range(len(images)), ALONE)
    oracle = cast("Detector", ColourOracle())
    output = Detection(sizes).output
    detections = find_all(output, oracle, batches, images, "oracle", ALONE, SilentReporter())
    truths = [images.truth(i, CLASSES) for i in range(len(images))]
    scores = score("voc07", truths, detections, CLASSES)
    assert scores.metrics == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_exact_where_the_size_stays(tmp_path: Path, flip: bool) -> None:
    images = opened(make_tree(tmp_path))
    loading = ImageLoading(images, recipe().data, CLASSES, False)
    for position in range(len(images)):
        batch = loading(ImageRequest(position, short_side=72, flip=flip))
        names = [CLASSES[label] for label in batch.targets[0].labels]
        found = rectangles(batch.images[0])
        assert batch.targets[0].boxes.tolist() == [found[name] for name in names]


def test_boxes_follow_the_image_when_resized_and_flipped(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path))
    loading = ImageLoading(images, recipe().data, CLASSES, False)
    batch = loading(ImageRequest(0, short_side=101, flip=True))
    found = rectangles(batch.images[0])[images.annotations[0].names[0]]
    assert batch.targets[0].boxes[0].tolist() == pytest.approx(found, abs=1.0)


def test_long_side_is_bounded() -> None:
    bounded = recipe(max_size=320).data
    assert resized_size(400, 200, 100, bounded) == (200, 100)
    assert resized_size(400, 100, 100, bounded) == (320, 80)


def test_squares_of_a_batch_have_one_size_and_boxes_follow(tmp_path: Path) -> None:
    batches = list(islice(order(tmp_path, square=True), 30))
    sides = [{request.short_side for request in batch} for batch in batches]
    assert all(len(of_batch) == 1 for of_batch in sides)
    assert set.union(*sides) == {72, 90}
    images = opened(tmp_path)
    loading = ImageLoading(images, recipe(square=True).data, CLASSES, False)
    batch = loading(ImageRequest(0, short_side=144, flip=True))
    assert batch.sizes == [(144, 144)]
    found = rectangles(batch.images[0])[images.annotations[0].names[0]]
    assert batch.targets[0].boxes[0].tolist() == pytest.approx(found, abs=1.0)


def order(tree: Path, train: int = 7, start: int = 0, **data: object) -> TrainingOrder:
    return TrainingOrder(opened(make_tree(tree, train=train)), recipe(**data), 0, start)


def test_every_image_comes_once_per_epoch(tmp_path: Path) -> None:
    batches = islice(order(tmp_path), 7)  # 21 images: three epochs
    positions = [request.position for batch in batches for request in batch]
    for epoch in range(3):
        assert sorted(positions[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert positions[:7] != positions[7:14]


def test_all_short_sides_are_used(tmp_path: Path) -> None:
    sides = {request.short_side for batch in islice(order(tmp_path), 30) for request in batch}
    assert sides == {72, 90}


def test_without_flip_nothing_is_flipped(tmp_path: Path) -> None:
    batches = islice(order(tmp_path, flip=False), 10)
    assert not any(request.flip for batch in batches for request in batch)


def test_order_goes_on_from_any_iteration(tmp_path: Path) -> None:
    whole = list(islice(order(tmp_path), 9))
    assert list(islice(order(tmp_path, start=4), 5)) == whole[4:]


@pytest.mark.parametrize("grouped", [False, True])
def test_wide_and_tall_images_are_batched_apart(tmp_path: Path, grouped: bool) -> None:
    for number in range(8):
        size = (96, 72) if number < 5 else (72, 96)
        add_image(tmp_path, f"i{number}", [("red", 1, 1, 20, 20)], size)
    add_split(tmp_path, "train", [f"i{number}" for number in range(8)])
    settings = recipe(group_by_aspect=grouped)
    batches = islice(TrainingOrder(opened(tmp_path), settings, 0), 24)
    kinds = [{request.position < 5 for request in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds) is grouped


def test_processes_share_a_batch(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path))
    settings = recipe()
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"batch_size": 4})}
    )
    (whole,) = islice(training_batches(images, settings, CLASSES, 0, 3, ALONE), 1)
    parts = [
        next(iter(training_batches(images, settings, CLASSES, 0, 3, World(ALONE.device, rank, 2))))
        for rank in range(2)
    ]
    shown = [image for part in parts for image in part.images]
    assert all(torch.equal(a, b) for a, b in zip(whole.images, shown, strict=True))


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path))

    def first_three(workers: int) -> list[DetectionBatch]:
        plain = recipe()
        train = plain.train.model_copy(update={"workers": workers})
        settings = plain.model_copy(update={"train": train})
        return list(islice(training_batches(images, settings, CLASSES, 0, 0, ALONE), 3))

    for one, other in zip(first_three(0), first_three(2), strict=True):
        for a, b in zip(one.images, other.images, strict=True):
            assert torch.equal(a, b)
        for c, d in zip(one.targets, other.targets, strict=True):
            assert torch.equal(c.boxes, d.boxes)


def test_images_without_objects_are_not_trained_on(tmp_path: Path) -> None:
    add_image(tmp_path, "empty", [])
    add_image(tmp_path, "full", [("red", 1, 1, 20, 20)])
    add_split(tmp_path, "train", ["empty", "full"])
    assert choose_labels(opened(tmp_path), recipe().data) == [1]
