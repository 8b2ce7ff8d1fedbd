"""The path of boxes: a detector that is told the objects must score what its boxes are worth.

Everything between annotation and AP is the real thing: images resized and flipped, offsets encoded
and decoded, detections selected, boxes taken back to the pixels of the source. Only what the
network would have learnt is put in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder

from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.detection_data import ImageLoading, ImageRequest, flip_boxes
from dupr_cli.evaluate.detectors import HeadOutput, Target
from dupr_cli.evaluate.detectors.roi_heads import BoxPredictor, RoIHeads
from dupr_cli.evaluate.inference import in_source_pixels
from dupr_cli.metrics import Detections, Metric, score
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from tests.support.labelled_scenes import COLOURS, KitObject, add_image, add_split

CLASSES = sorted(COLOURS)


@dataclass(frozen=True)
class Scene:
    """Sizes of the images, and their objects, which do not overlap."""

    sizes: list[tuple[int, int]]
    objects: list[list[KitObject]]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Every image is cut into 2 x 2 cells with at most one object each, 24 pixels or more.

    Objects are at most 0.6 of a cell wide, so that one can move by a fifth towards the middle.
    """
    sizes: list[tuple[int, int]] = []
    objects: list[list[KitObject]] = []
    for _ in range(draw(st.integers(1, 3))):
        width, height = draw(st.integers(100, 260)), draw(st.integers(100, 260))
        cell_width, cell_height = width // 2, height // 2
        of_image: list[KitObject] = []
        cells = draw(st.sets(st.integers(0, 3), min_size=0 if objects else 1))
        for cell in sorted(cells):
            w = draw(st.integers(24, int(0.6 * cell_width)))
            h = draw(st.integers(24, int(0.6 * cell_height)))
            x = cell % 2 * cell_width + draw(st.integers(1, cell_width - w))
            y = cell // 2 * cell_height + draw(st.integers(1, cell_height - h))
            of_image.append((draw(st.sampled_from(CLASSES)), x, y, x + w - 1, y + h - 1))
        sizes.append((width, height))
        objects.append(of_image)
    return Scene(sizes, objects)


def labelled(scene: Scene, root: Path) -> LabelledSet:
    for number, (size, objects) in enumerate(zip(scene.sizes, scene.objects, strict=True)):
        add_image(root, f"img{number}", objects, size)
    add_split(root, "val", [f"img{number}" for number in range(len(scene.sizes))])
    return open_labelled(str(root), ["val"], SilentReporter())


class ToldPredictor(BoxPredictor):
    """Scores and offsets that lead from the proposals to the boxes it was told."""

    def __init__(self) -> None:
        super().__init__(1, len(CLASSES))
        self.scores, self.offsets = torch.zeros(0), torch.zeros(0)

    def tell(self, proposals: Tensor, boxes: Tensor, labels: Tensor) -> None:
        coded = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode([boxes], [proposals])[0]
        self.scores = torch.full((len(labels), len(CLASSES) + 1), -20.0)
        self.scores[torch.arange(len(labels)), labels] = 20.0
        self.offsets = coded[:, None].repeat(1, len(CLASSES), 1)

    def forward(self, _vectors: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores, self.offsets


class BlindHead(nn.Module):
    def forward(self, _features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        vectors = torch.zeros(sum(map(len, boxes)), 1)
        return vectors, vectors


def moved(boxes: Tensor, width: int, share: float) -> Tensor:
    """Boxes moved by a share of their width towards the middle of the image."""
    inwards = torch.where(boxes[:, 0] + boxes[:, 2] < width, 1.0, -1.0)
    step = share * (boxes[:, 2] - boxes[:, 0]) * inwards
    return boxes + torch.stack([step, torch.zeros_like(step)] * 2, dim=1)


def detections(
    images: LabelledSet, position: int, request: ImageRequest, max_size: int, share: float
) -> Detections:
    recipe = EvaluateRecipe.model_validate(
        {"data": {"train_sizes": [32], "test_size": 32, "max_size": max_size}}
    )
    predictor = ToldPredictor()
    heads = RoIHeads(BlindHead(), predictor, len(CLASSES), False, 0, recipe.detector, recipe.test)
    batch = ImageLoading(images, recipe.data, CLASSES, False)(request)
    (target,), (height, width) = batch.targets, batch.images[0].shape[1:]
    predictor.tell(proposals := near(target), moved(target.boxes, width, share), target.labels)
    (found,) = heads.detect([], [proposals], [(height, width)])
    if request.flip:
        turned = torch.from_numpy(flip_boxes(found.boxes.numpy(), width))
        found = HeadOutput(turned, found.labels, found.scores)
    return in_source_pixels(found, images.annotations[position], width, height)


def near(target: Target) -> Tensor:
    """Proposals that the offsets have to correct in place and size."""
    sides = target.boxes[:, 2:] - target.boxes[:, :2]
    return torch.cat([target.boxes[:, :2] + 0.3 * sides, target.boxes[:, 2:] + 0.5 * sides], 1)


def scored(
    scene: Scene, short_side: int, max_size: int, flip: bool, share: float, metric: Metric
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        images = labelled(scene, Path(folder))
        found = [
            detections(images, i, ImageRequest(i, short_side, flip), max_size, share)
            for i in range(len(images))
        ]
        truths = [images.truth(i, CLASSES) for i in range(len(images))]
        return score(metric, truths, found, CLASSES).metrics


paths = given(
    scene=scenes(),
    short_side=st.integers(32, 700),
    max_size=st.integers(700, 1000),
    flip=st.booleans(),
    metric=st.sampled_from(["voc07", "voc10", "coco"]),
)


@settings(max_examples=40, deadline=None)
@paths
def test_objects_as_output_score_100_at_any_size_and_flip(
    scene: Scene, short_side: int, max_size: int, flip: bool, metric: Metric
) -> None:
    scores = scored(scene, short_side, max_size, flip, 0.0, metric)
    assert [scores[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([100, 100, 100])


@settings(max_examples=40, deadline=None)
@paths
def test_boxes_moved_by_a_fifth_score_40_at_any_size_and_flip(
    scene: Scene, short_side: int, max_size: int, flip: bool, metric: Metric
) -> None:
    """IoU is 0.8 / 1.2 = 2/3: right at 0.50, 0.55, 0.60 and 0.65, wrong at the other six."""
    scores = scored(scene, short_side, max_size, flip, 0.2, metric)
    assert [scores[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([40, 100, 0])


def test_sides_are_rounded_apart_and_undone_apart() -> None:
    """33 x 100 with a short side of 50 is 50 x 152: factors of 1.5152 and 1.52."""
    scene = Scene([(33, 100)], [[("red", 1, 1, 33, 100)]])
    with tempfile.TemporaryDirectory() as folder:
        images = labelled(scene, Path(folder))
        found = detections(images, 0, ImageRequest(0, 50), 1000, 0.0)
    np.testing.assert_allclose(found.boxes, [[0, 0, 33, 100]], atol=1e-4)
