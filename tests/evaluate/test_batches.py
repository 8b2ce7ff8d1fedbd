"""Batches: boxes follow the pixels, and the order is a function of seed and iteration alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dupr_cli.evaluate.batches import (
    Batch,
    ImageLoading,
    Request,
    TrainingOrder,
    resized_size,
    test_batches,
    training_batches,
    training_positions,
)
from dupr_cli.evaluate.inference import detect_all
from dupr_cli.evaluate.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.metrics.voc import voc_scores
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from tests.evaluate.scenes import COLOURS, add_image, add_split, make_tree

test_batches.__test__ = False  # type: ignore[attr-defined]

CLASSES = sorted(COLOURS)


def recipe(**data: object) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate(
        {
            "data": {"train_sizes": [72, 90], "test_size": 100, "max_size": 200, **data},
            "train": {"batch_size": 3, "workers": 0},
        }
    )


def opened(tree: Path, split: str = "train") -> LabelledSet:
    return open_labelled(str(tree), split, SilentReporter())


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

    def detect(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = rectangles(images[0])
        return [
            {
                "boxes": torch.tensor(list(found.values())).reshape(-1, 4),
                "labels": torch.tensor([CLASSES.index(name) for name in found]),
                "scores": torch.ones(len(found)),
            }
        ]


def test_oracle_scores_100_through_resize_and_back(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path, val=8), "val")
    # Eight times the size: what blurs at the edges is small against IoU 0.95.
    sizes = recipe(test_size=576, max_size=1000)
    batches = test_batches(images, sizes, CLASSES, pin_memory=False)
    oracle = ColourOracle()
    detections = detect_all(oracle, batches, images, "oracle", SilentReporter())  # type: ignore[arg-type]
    truths = [images.truth(i, CLASSES) for i in range(len(images))]
    scores = voc_scores(truths, detections, CLASSES, "voc07")
    assert scores.metrics == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_exact_where_the_size_stays(tmp_path: Path, flip: bool) -> None:
    images = opened(make_tree(tmp_path))
    loading = ImageLoading(images, recipe().data, CLASSES)
    for position in range(len(images)):
        batch = loading[Request(position, short_side=72, flip=flip)]
        names = [CLASSES[label] for label in batch.labels[0]]
        found = rectangles(batch.images[0])
        assert batch.boxes[0].tolist() == [found[name] for name in names]


def test_boxes_follow_the_image_when_resized_and_flipped(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path))
    loading = ImageLoading(images, recipe().data, CLASSES)
    batch = loading[Request(0, short_side=101, flip=True)]
    found = rectangles(batch.images[0])[images.annotations[0].names[0]]
    assert batch.boxes[0][0].tolist() == pytest.approx(found, abs=1.0)


def test_long_side_is_bounded() -> None:
    assert resized_size(400, 200, 100, 320) == (200, 100)
    assert resized_size(400, 100, 100, 320) == (320, 80)


def test_every_image_comes_once_per_epoch() -> None:
    batches = islice(TrainingOrder(7, recipe()), 7)  # 21 images: three epochs
    positions = [request.position for batch in batches for request in batch]
    for epoch in range(3):
        assert sorted(positions[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert positions[:7] != positions[7:14]


def test_one_short_side_per_batch_and_all_are_used() -> None:
    batches = list(islice(TrainingOrder(7, recipe()), 30))
    sides = [{request.short_side for request in batch} for batch in batches]
    assert all(len(side) == 1 for side in sides)
    assert set.union(*sides) == {72, 90}


def test_without_flip_nothing_is_flipped() -> None:
    batches = islice(TrainingOrder(7, recipe(flip=False)), 10)
    assert not any(request.flip for batch in batches for request in batch)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path))

    def first_three(workers: int) -> list[Batch]:
        plain = recipe()
        train = plain.train.model_copy(update={"workers": workers})
        loader = training_batches(
            images, plain.model_copy(update={"train": train}), CLASSES, pin_memory=False
        )
        return list(islice(loader, 3))

    for one, other in zip(first_three(0), first_three(2), strict=True):
        for a, b in zip(one.images + one.boxes, other.images + other.boxes, strict=True):
            assert torch.equal(a, b)


def test_images_without_objects_are_not_trained_on(tmp_path: Path) -> None:
    add_image(tmp_path, "empty", [])
    add_image(tmp_path, "full", [("red", 1, 1, 20, 20)])
    add_split(tmp_path, "train", ["empty", "full"])
    assert training_positions(opened(tmp_path), recipe()) == [1]


def test_training_subset_is_drawn_with_the_seed(tmp_path: Path) -> None:
    images = opened(make_tree(tmp_path, train=20))
    subset = recipe(train_images=5)
    drawn = training_positions(images, subset)
    assert len(set(drawn)) == 5
    assert drawn == training_positions(images, subset)
    assert drawn != training_positions(images, subset.model_copy(update={"seed": 1}))
