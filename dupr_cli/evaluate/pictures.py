"""Pictures of an evaluation: detections beside the ground truth, and the losses of training."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.evaluate.labelled import LabelledSet
from dupr_cli.evaluate.metrics import Detections
from dupr_cli.evaluate.training import LossRecord

Colour = tuple[int, int, int]

_LONG_SIDE = 360  # pixels of every picture, small images enlarged
_GAP = 10
_HEADER = 28
_CAPTION = 22
_FONT_SIZE = 14
_SCORE = 0.3  # detections below are not drawn
_MOST = 8  # detections drawn per picture
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def draw_detections(
    path: Path,
    images: LabelledSet,
    classes: Sequence[str],
    detections: Mapping[str, Sequence[Detections]],
    count: int,
) -> None:
    """A PNG with one row per image: ground truth, then the detections of each weights by name.

    count: images drawn, spread evenly over those with objects.
    """
    with_objects = [i for i, annotation in enumerate(images.annotations) if annotation.names]
    places = np.linspace(0, len(with_objects) - 1, min(count, len(with_objects)))
    positions = [with_objects[round(place)] for place in places]
    rows = [_row(images, position, classes, detections) for position in positions]
    titles = ["ground truth", *detections]
    width = _GAP + len(titles) * (_LONG_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _HEADER + sum(r.height + _GAP for r in rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        place = (_GAP + column * (_LONG_SIDE + _GAP), _HEADER // 2)
        draw.text(place, title, _INK, _font(_FONT_SIZE + 2), anchor="lm")
    top = _HEADER
    for row in rows:
        sheet.paste(row, (_GAP, top))
        top += row.height + _GAP
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _row(
    images: LabelledSet,
    position: int,
    classes: Sequence[str],
    detections: Mapping[str, Sequence[Detections]],
) -> Image.Image:
    image, annotation = images.image(position), images.annotations[position]
    colours = {name: _colour(number, len(classes)) for number, name in enumerate(classes)}
    labels = [
        (box, colours[name], f"{name} (difficult)" if difficult else name)
        for box, name, difficult in zip(
            annotation.boxes, annotation.names, annotation.difficult, strict=True
        )
    ]
    panels = [(_with_boxes(image, labels), annotation.image_id)]
    for of_weights in detections.values():
        found = of_weights[position]
        shown = np.flatnonzero(found.scores >= _SCORE)[:_MOST]
        labels = [
            (found.boxes[i], colours[name], f"{name} {found.scores[i]:.2f}")
            for i in shown
            for name in [classes[found.labels[i]]]
        ]
        panels.append((_with_boxes(image, labels), _caption(found, len(shown), classes)))
    height = panels[0][0].height
    row = Image.new("RGB", (len(panels) * (_LONG_SIDE + _GAP) - _GAP, height + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(row)
    for column, (panel, caption) in enumerate(panels):
        left = column * (_LONG_SIDE + _GAP)
        row.paste(panel, (left, 0))
        draw.text((left, height + _CAPTION // 2), caption, _INK, _font(12), anchor="lm")
    return row


def _caption(found: Detections, shown: int, classes: Sequence[str]) -> str:
    if shown:
        above = int(np.count_nonzero(found.scores >= _SCORE))
        return f"{shown} of {above} detections of score {_SCORE} or more"
    if len(found.scores):
        return f"none of score {_SCORE}; best: {classes[found.labels[0]]} {found.scores[0]:.2f}"
    return "no detections"


def _with_boxes(
    image: Image.Image, labels: Sequence[tuple[NDArray[np.floating], Colour, str]]
) -> Image.Image:
    """The image at the pictures' size, boxes in its own pixels drawn over it, each with a text."""
    scale = _LONG_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    panel = image.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(panel)
    font = _font(_FONT_SIZE)
    # The first is the surest: drawn last, on top.
    for box, colour, _ in reversed(labels):
        x0, y0, x1, y1 = (float(edge) * scale for edge in box)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=3)
    for box, colour, text in reversed(labels):
        x0, y0 = float(box[0]) * scale, float(box[1]) * scale
        _, _, right, bottom = draw.textbbox((0, 0), text, font)
        x = min(max(0.0, x0), max(0.0, panel.width - right - 6))
        # Above the box where there is room, else inside it.
        y = y0 - bottom - 4 if y0 >= bottom + 4 else max(0.0, y0)
        draw.rectangle((x, y, x + right + 6, y + bottom + 4), fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text((x + 3, y + 1), text, _INK if bright else _PAPER, font)
    return panel


def _colour(number: int, total: int) -> Colour:
    """Hues spread evenly over the classes, neighbours told apart by brightness too."""
    value = (1.0, 0.8)[number % 2]
    red, green, blue = colorsys.hsv_to_rgb(number / total, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_losses(path: Path, losses: Mapping[str, Sequence[LossRecord]]) -> None:
    """A PNG of the training losses, the sum and its four parts, one line per weights by name."""
    from matplotlib.figure import Figure

    parts = list(next(iter(losses.values()))[0].losses)
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["sum", "sum", parts[0], parts[1]], ["sum", "sum", parts[2], parts[3]]]
    )
    for name, records in losses.items():
        iterations = [record.iteration for record in records]
        # A single record makes no line.
        marker = "o" if len(records) < 3 else ""
        axes["sum"].plot(iterations, [r.total for r in records], marker=marker, label=name)
        for part in parts:
            axes[part].plot(iterations, [r.losses[part] for r in records], marker=marker)
    for part, axis in axes.items():
        axis.set_title("training loss" if part == "sum" else part.replace("_", " "), fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes["sum"].set_xlabel("iteration")
    axes["sum"].legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
