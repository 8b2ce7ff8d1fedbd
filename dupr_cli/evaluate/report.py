"""What people read of an evaluation: table.txt in 80 columns, and detections.json row by row."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from dupr_cli.artifacts.results import DatasetIdentity, Results
from dupr_cli.evaluate.metrics import Detections

_WIDTH = 80
_NAME_WIDTH = 24
_COLUMNS = 7  # of the table per class, beside the class name


class DetectionRow(TypedDict):
    """One detection. box: x_min, y_min, x_max, y_max, pixel edges, 0-based and half-open."""

    image_id: str
    # A field named `class` needs the call syntax of TypedDict; `name` is what Box calls it, too.
    name: str
    score: float
    box: list[float]


def detection_rows(
    detections: Sequence[Detections], image_ids: Sequence[str], classes: Sequence[str]
) -> str:
    """JSON: a list with one detection per line, in the order of the images and of the detector."""
    lines = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
            row: DetectionRow = {
                "image_id": image_id,
                "name": classes[label],
                "score": float(score),
                "box": [float(edge) for edge in box],
            }
            lines.append(json.dumps(row, ensure_ascii=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def detections_from_rows(
    rows: Sequence[DetectionRow], image_ids: Sequence[str], classes: Sequence[str]
) -> list[Detections]:
    """The inverse of `detection_rows`. Raises KeyError or ValueError for what it did not write."""
    by_image: dict[str, list[DetectionRow]] = {image_id: [] for image_id in image_ids}
    for row in rows:
        by_image[row["image_id"]].append(row)
    return [
        Detections(
            np.array([row["box"] for row in found], dtype=np.float64).reshape(-1, 4),
            np.array([classes.index(row["name"]) for row in found], dtype=np.int64),
            np.array([row["score"] for row in found], dtype=np.float64),
        )
        for found in by_image.values()
    ]


def table(results: Results, names: Sequence[str]) -> str:
    """Plain text of at most 80 columns. names: a short one for each of the weights."""
    lines = textwrap.wrap(results.metric, _WIDTH)
    for verb, used in (("Trained", results.train), ("Tested", results.test)):
        lines += textwrap.wrap(f"{verb} on {_describe(used)}", _WIDTH, subsequent_indent="  ")
    lines += ["", f"{'weights':<{_NAME_WIDTH}} {'backbone':<10}     AP   AP50   AP75  train s"]
    for name, entry in zip(names, results.results, strict=True):
        figures = "".join(f"{entry.metrics[metric]:7.1f}" for metric in ("AP", "AP50", "AP75"))
        lines.append(
            f"{_short(name):<{_NAME_WIDTH}} {entry.architecture:<10}{figures}"
            f"{entry.seconds['train']:9.0f}"
        )
    for first in range(0, len(names), _COLUMNS):
        lines += ["", *_class_table(results, names, range(first, len(names))[:_COLUMNS])]
    lines.append("")
    for name, entry in zip(names, results.results, strict=True):
        lines += textwrap.wrap(f"{name}: {entry.weights}", _WIDTH, subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def _describe(used: DatasetIdentity) -> str:
    return f"{used.images} images, {used.objects} objects: {used.address}, split {used.split}"


def _class_table(results: Results, names: Sequence[str], columns: range) -> list[str]:
    """AP of each class; a dash where the test images have no object of it to find."""
    heads = "".join(f"{names[i].partition('-')[0]:>7}" for i in columns)
    lines = [f"{'AP of class':<{_NAME_WIDTH}}{heads}"]
    for name in results.classes:
        cells = [results.results[i].per_class.get(name) for i in columns]
        figures = "".join(f"{cell['AP']:7.1f}" if cell else f"{'-':>7}" for cell in cells)
        lines.append(f"{_short(name):<{_NAME_WIDTH}}{figures}")
    return lines


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
