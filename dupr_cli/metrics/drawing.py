"""An analysis on disk: analysis.json, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dupr_cli.artifacts.files import atomic_file, write_json
from dupr_cli.metrics.analysis import Analysis
from dupr_cli.metrics.types import Integers
from dupr_cli.outside_text import plot_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANALYSIS = "analysis.json"
ANALYSIS_FILES = (ANALYSIS, "precision_recall.png", "confusion.png", "errors.png")
# More lines than this in one plot are indistinguishable; larger matrices are unreadable.
_NAMED_CURVES, _WRITTEN_CELLS = 20, 12


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write `ANALYSIS_FILES` into an existing folder."""
    for name, draw in (
        ("precision_recall.png", _curves), ("confusion.png", _confusion), ("errors.png", _errors)
    ):  # fmt: skip
        _save(draw(analysis), folder / name)
    write_json(folder / ANALYSIS, {"format_version": 1, **asdict(analysis)})


def write_semantic_analysis(folder: Path, matrix: Integers, classes: Sequence[str]) -> None:
    """Write the confusion of pixels, in numbers and as a picture, into an existing folder."""
    figure = _matrix(matrix, classes, "predicted", "labelled", "pixels of each class, by row")
    _save(figure, folder / "confusion.png")
    content = {"classes": list(classes), "confusion": matrix.tolist()}
    write_json(folder / ANALYSIS, {"format_version": 1, **content})


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _curves(analysis: Analysis) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.add_subplot()
    named = len(analysis.curves) <= _NAMED_CURVES
    for name, curve in analysis.curves.items():
        label = f"{plot_label(name)} {100 * curve.average_precision:.1f}" if named else None
        axis.plot([0, *curve.recall], [1, *curve.precision], label=label)
    axis.set(
        xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision",
        title=f"IoU {analysis.iou:g}, mean AP {analysis.average_precision:.1f}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    if named and analysis.curves:
        figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _confusion(analysis: Analysis) -> Figure:
    title = f"detections with score {analysis.confusion_score:g} or more, IoU over {analysis.iou:g}"
    names = [*analysis.classes, "background"]
    return _matrix(np.array(analysis.confusion), names, "found", "object", title)


def _matrix(
    counts: Integers, classes: Sequence[str], found: str, labelled: str, title: str
) -> Figure:
    """Colours are shares of a row: of a class's objects, or of the detections on background."""
    from matplotlib.figure import Figure

    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    names = [*map(plot_label, classes)]
    side = 3 + 0.4 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set(xlabel=found, ylabel=labelled)
    axis.set_title(title, fontsize=9)
    if len(names) <= _WRITTEN_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    return figure


def _errors(analysis: Analysis) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axis = figure.add_subplot()
    kinds = list(analysis.errors)
    bars = axis.barh(kinds, [analysis.errors[kind].cost for kind in kinds])
    axis.bar_label(bars, [f" {analysis.errors[kind].count}" for kind in kinds], fontsize=9)
    axis.margins(x=0.12)  # room for the number at the longest bar
    axis.invert_yaxis()
    axis.set_xlabel("loss of AP50, percent (and number of errors)")
    axis.grid(axis="x", alpha=0.3)
    return figure
