"""Testing: detections of a trained detector on every test image, in pixels of that image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from dupr_cli.evaluate.batches import Batch
from dupr_cli.evaluate.detector import Detector
from dupr_cli.evaluate.labelled import Annotation, LabelledSet
from dupr_cli.evaluate.metrics import Detections
from dupr_cli.progress import Reporter


def detect_all(
    detector: Detector, batches: Iterable[Batch], images: LabelledSet, name: str, reporter: Reporter
) -> list[Detections]:
    """Detections of each image of the set, in its order, highest score first.

    batches: the set's images one by one, see `test_batches`. name: of the weights, for progress.
    """
    detector.eval()
    found: list[Detections] = []
    with torch.inference_mode(), reporter.task(f"test {name}", len(images), "images") as task:
        for annotation, batch in zip(images.annotations, batches, strict=True):
            (detections,) = detector.detect(batch.images)
            height, width = batch.images[0].shape[1:]
            found.append(_in_source_pixels(detections, annotation, width, height))
            task.advance()
    return found


def _in_source_pixels(
    detections: dict[str, torch.Tensor], annotation: Annotation, width: int, height: int
) -> Detections:
    """Undo the resize to (width, height); the two sides were rounded to whole pixels apart."""
    scale = np.array([annotation.width / width, annotation.height / height] * 2)
    return Detections(
        detections["boxes"].cpu().numpy() * scale,
        detections["labels"].cpu().numpy(),
        detections["scores"].cpu().numpy(),
    )
