"""The readable output of an evaluation: table.txt in 80 columns, and detections.json row by row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.evaluate.statistics import compared_metrics
from dupr_cli.metrics.semantic import MEAN_IOU
from dupr_cli.metrics.types import Detections, Rle
from dupr_cli.outside_text import json_text, one_line
from dupr_cli.recipe import recipe_value

_WIDTH = 80
_NAME_WIDTH = 24
_COLUMNS = 7  # of the per-class table, beside the class name


class DetectionRow(TypedDict):
    """One detection. box: x_min, y_min, x_max, y_max, pixel edges, 0-based and half-open.

    mask: COCO's compressed run lengths, for detectors with masks. keypoints: x, y and score of
    each, for detectors with keypoints; x and y index a pixel, as in COCO's results.
    """

    image_id: str
    # A field named `class` needs the call syntax of TypedDict; Box also calls it `name`.
    name: str
    score: float
    box: list[float]
    mask: NotRequired[Rle]
    keypoints: NotRequired[list[float]]


def detection_rows(
    detections: Sequence[Detections], image_ids: Sequence[str], classes: Sequence[str]
) -> str:
    """JSON: a list with one detection per line, in the order of the images and of the detector."""
    lines = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for i, (box, label) in enumerate(zip(found.boxes, found.labels, strict=True)):
            row: DetectionRow = {
                "image_id": image_id,
                "name": classes[label],
                "score": float(found.scores[i]),
                "box": [float(edge) for edge in box],
            }
            if found.masks is not None:
                row["mask"] = found.masks[i]
            if found.keypoints is not None:
                row["keypoints"] = [float(value) for value in found.keypoints[i].reshape(-1)]
            lines.append(json_text(row))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def detections_from_rows(
    rows: Sequence[DetectionRow], image_ids: Sequence[str], classes: Sequence[str]
) -> list[Detections]:
    """The inverse of `detection_rows`. Raises KeyError or ValueError for anything else."""
    by_image: dict[str, list[DetectionRow]] = {image_id: [] for image_id in image_ids}
    for row in rows:
        by_image[row["image_id"]].append(row)
    return [
        Detections(
            np.array([row["box"] for row in found], dtype=np.float64).reshape(-1, 4),
            np.array([classes.index(row["name"]) for row in found], dtype=np.int64),
            np.array([row["score"] for row in found], dtype=np.float64),
            tuple(row["mask"] for row in found) if found and "mask" in found[0] else None,
            keypoints=_keypoints_of(found),
        )
        for found in by_image.values()
    ]


def _keypoints_of(rows: Sequence[DetectionRow]) -> NDArray[np.float64] | None:
    if not rows or "keypoints" not in rows[0]:
        return None
    return np.array([row["keypoints"] for row in rows], dtype=np.float64).reshape(len(rows), -1, 3)


def table(results: Results) -> str:
    """Plain text of at most 80 columns."""
    names = [str(entry.extra["folder"]) for entry in results.results]
    lines = textwrap.wrap(one_line(f"{results.protocol}: {results.metric}"), _WIDTH)
    for verb, used in (("Trained", results.train), ("Tested", results.test)):
        lines += _wrapped(f"{verb} on {_describe(used)}")
    for key, (shipped, now) in results.changes.items():
        lines += _wrapped(
            f"Changed: {key} is {recipe_value(now)}; {results.protocol} has {recipe_value(shipped)}"
        )
    for note in results.notes:
        lines += _wrapped(f"Note: {note}")
    count = len(results.seeds)
    lines += ["", _trials_line(count)]
    compared = compared_metrics(results.results[0].metrics)
    heads = "".join(f"{metric:>{8 if count == 1 else 11}}" for metric in compared)
    lines.append(f"{'weights':<{_NAME_WIDTH}} {'backbone':<11}{heads}  train s")
    for name, entry in zip(names, results.results, strict=True):
        figures = "".join(_figure(entry, metric, count) for metric in compared)
        lines.append(
            f"{shortened(name):<{_NAME_WIDTH}} {one_line(entry.architecture):<11}{figures}"
            f"{entry.seconds['train']:9.0f}"
        )
    lines += _difference_lines(results, count)
    rest = [m for m in results.results[0].metrics if m not in compared]
    for first in range(0, len(names), _COLUMNS):
        columns = range(first, len(names))[:_COLUMNS]
        if rest:
            lines += ["", *_metric_table(results, names, rest, columns)]
        lines += ["", *_class_table(results, names, columns)]
    lines.append("")
    for name, entry in zip(names, results.results, strict=True):
        lines += _wrapped(f"{name}: {entry.weights}")
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(one_line(text), _WIDTH, subsequent_indent="  ")


def _trials_line(count: int) -> str:
    if count == 1:
        return "One seed: a difference may be chance. --seeds 5 shows the spread."
    return f"Means over {count} seeds, and standard deviations"


def _figure(entry: WeightsResult, metric: str, count: int) -> str:
    if count == 1:
        return f"{entry.metrics[metric]:8.1f}"
    return f"{entry.metrics[metric]:6.1f} ±{entry.deviations.get(metric, 0.0):3.1f}"


def _difference_lines(results: Results, count: int) -> list[str]:
    """Every pair of weights, with the conclusion in words."""
    if not results.differences:
        return []
    confidence = round(100 * results.differences[0].confidence)
    deciding = {found.metric for found in results.differences if found.adjusted_p is not None}
    pairs = len(results.differences) // len({found.metric for found in results.differences})
    head = f"Paired differences over {count} seeds, {confidence} % intervals of each by itself."
    if deciding:
        head += f" {deciding.pop()} decides, over {pairs} pair{'s' * (pairs > 1)} (Holm)."
    lines = ["", *_wrapped(head)]
    pair = ("", "")
    for found in results.differences:
        if (found.first, found.second) != pair:
            pair = (found.first, found.second)
            lines += _wrapped(f"{found.first} minus {found.second}")
        interval = f"[{found.low:+z.1f}, {found.high:+z.1f}]"
        verdict = "real" if found.is_real else "may be chance"
        if found.adjusted_p is None:
            verdict = ""
        line = f"  {found.metric:<8}{found.mean:+6.1f}  {interval:<16} {verdict}"
        lines.append(line.rstrip())
    return lines


def _metric_table(
    results: Results, names: Sequence[str], metrics: Sequence[str], columns: range
) -> list[str]:
    """Further metrics, such as AP of small objects, one line each."""
    lines = [f"{'metric':<{_NAME_WIDTH}}{_numbers(names, columns)}"]
    for metric in metrics:
        cells = [results.results[i].metrics.get(metric) for i in columns]
        lines.append(f"{shortened(metric):<{_NAME_WIDTH}}{_cells(cells)}")
    return lines


def _numbers(names: Sequence[str], columns: range) -> str:
    return "".join(f"{names[i].partition('-')[0]:>7}" for i in columns)


def _cells(values: Sequence[float | None]) -> str:
    return "".join(f"{'-':>7}" if v is None else f"{v:7.1f}" for v in values)


def _describe(used: DatasetIdentity) -> str:
    objects = f", {used.objects} objects" if used.objects else ""
    return f"{used.images} images{objects}: {used.address}, split {used.split}"


def _class_table(results: Results, names: Sequence[str], columns: range) -> list[str]:
    """AP or IoU of each class; a dash if the test images have nothing of that class to find."""
    metric = "IoU" if MEAN_IOU in results.results[0].metrics else "AP"
    head = f"{metric} of class"
    lines = [f"{head:<{_NAME_WIDTH}}{_numbers(names, columns)}"]
    for name in results.classes:
        found = [results.results[i].per_class.get(name) for i in columns]
        cells = [None if of is None else of[metric] for of in found]
        lines.append(f"{shortened(name):<{_NAME_WIDTH}}{_cells(cells)}")
    return lines


def shortened(name: str, width: int = _NAME_WIDTH) -> str:
    """A name of at most `width` characters, on one line."""
    name = one_line(name)
    return name if len(name) <= width else name[: width - 3] + "..."
