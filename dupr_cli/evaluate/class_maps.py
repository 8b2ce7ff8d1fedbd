"""Testing of semantic segmentation: the class of every pixel, in the size of the image's mask.

Predictions are kept as PNG files of class numbers in one archive of the trial:

    predictions.zip    image_ids.json, and 000000.png, 000001.png, ... in that order
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.datasets.masks import Mask, read_mask
from dupr_cli.datasets.semantic import SemanticSet
from dupr_cli.evaluate.cell_scores import CellScores, Size
from dupr_cli.metrics.semantic import confusion
from dupr_cli.metrics.types import Integers

PREDICTIONS_FILE = "predictions.zip"
_IDS = "image_ids.json"


@dataclass(frozen=True)
class Prediction:
    """The class of every pixel of an image, as a PNG of class numbers: masks of a large set do not
    fit into memory otherwise."""

    png: bytes

    @classmethod
    def of(cls, numbers: Mask) -> Prediction:
        file = io.BytesIO()
        Image.fromarray(numbers).save(file, "PNG")
        return cls(file.getvalue())

    def numbers(self) -> Mask:
        """(height, width) class numbers."""
        return read_mask(io.BytesIO(self.png), PREDICTIONS_FILE)


def class_map(scores: CellScores, size: Size) -> Prediction:
    """The class with the highest score for each pixel of the image at `size`, height and width."""
    return Prediction.of(scores.at_pixels(size).argmax(0).to(torch.uint8).cpu().numpy())


def class_map_by_windows(
    detect: Callable[[list[Tensor]], Sequence[CellScores]], image: Tensor, side: int, size: Size
) -> Prediction:
    """`class_map` of scores that are the mean over windows of `side` pixels, a third overlapping.

    image: (C, H, W), as the network takes it. detect: scores of windows.
    Source: mmsegmentation's slide inference, as for Cityscapes.
    """
    total: Tensor | None = None
    for top in _starts(image.shape[1], side):
        for left in _starts(image.shape[2], side):
            window = image[:, top : top + side, left : left + side]
            (found,) = detect([window])
            scores = found.at_pixels()
            if total is None:
                total = scores.new_zeros(len(scores) + 1, *image.shape[1:])
            place = total[:, top : top + side, left : left + side]
            place[:-1] += scores
            place[-1] += 1
    assert total is not None
    mean = total[:-1] / total[-1]
    if mean.shape[1:] != size:
        mean = interpolate(mean[None], size, mode="bilinear", align_corners=False)[0]
    return Prediction.of(mean.argmax(0).to(torch.uint8).cpu().numpy())


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin along one side; the last ends with the image."""
    last = max(0, length - side)
    step = max(1, side * 2 // 3)
    return sorted({*range(0, last, step), last})


def counted(images: LabelledSet, position: int, prediction: Prediction, classes: int) -> Integers:
    """`confusion` of one image."""
    return confusion(cast(SemanticSet, images).mask(position), prediction.numbers(), classes)


def counted_all(images: LabelledSet, predictions: Sequence[Prediction], classes: int) -> Integers:
    """`confusion` of all images."""
    total = np.zeros((classes, classes), dtype=np.int64)
    for position, prediction in enumerate(predictions):
        total += counted(images, position, prediction, classes)
    return total


def write_predictions(
    folder: Path, predictions: Sequence[Prediction], image_ids: Sequence[str]
) -> None:
    """Members have no time of writing, so that equal predictions are equal files."""
    with atomic_file(folder / PREDICTIONS_FILE) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(_IDS), json.dumps(list(image_ids)))
        for number, prediction in enumerate(predictions):
            archive.writestr(zipfile.ZipInfo(_member(number)), prediction.png)


def read_predictions(folder: Path, image_ids: Sequence[str]) -> list[Prediction]:
    """Raises OSError, ValueError or KeyError for anything but the predictions of these images."""
    try:
        with zipfile.ZipFile(folder / PREDICTIONS_FILE) as archive:
            if json.loads(archive.read(_IDS)) != list(image_ids):
                raise ValueError("the predictions are of other images")
            return [Prediction(archive.read(_member(n))) for n in range(len(image_ids))]
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error


def _member(number: int) -> str:
    return f"{number:06d}.png"
