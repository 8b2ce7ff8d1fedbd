"""Pictures of an evaluation: what was found beside the ground truth, and curves of losses and
metric."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.pixel_formats import as_picture
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.datasets.semantic import SemanticSet
from dupr_cli.evaluate.class_maps import Prediction, counted
from dupr_cli.metrics.arrays import pair_iou
from dupr_cli.metrics.semantic import IGNORE, MEAN_IOU, semantic_scores
from dupr_cli.metrics.types import Detections, Truth
from dupr_cli.outside_text import one_line, plot_label

if TYPE_CHECKING:
    from dupr_cli.evaluate.trials import Outcome

Colour = tuple[int, int, int]

_LONG_SIDE = 360  # pixels of every picture; small images are enlarged
_GAP = 10
_HEADER = 28
_CAPTION = 22
_FONT_SIZE = 14
_SCORE = 0.3  # lower-scoring detections are not drawn
_MOST = 8  # detections drawn per picture
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_WRONG = np.array([[220, 20, 20]])
_CAPTION_LETTERS = 60


def draw_detections(
    path: Path,
    images: LabelledSet,
    classes: Sequence[str],
    detections: Mapping[str, Sequence[Detections]],
    count: int,
) -> None:
    """A PNG with one row per image: ground truth, then the detections for each weights, by name.

    count: images drawn: a third best and a third worst for the first weights, a third random.
    """
    first = next(iter(detections.values()))
    quality = {
        i: _quality(images.truth(i, classes), first[i])
        for i, annotation in enumerate(images.annotations)
        if annotation.names
    }
    rows = [
        _row(images, position, classes, detections, kind)
        for position, kind in _chosen(quality, count)
    ]
    _draw_sheet(path, ["ground truth", *detections], rows)


def draw_class_maps(
    path: Path,
    images: SemanticSet,
    classes: Sequence[str],
    predictions: Mapping[str, Sequence[Prediction]],
    count: int,
) -> None:
    """A PNG with one row per image: the image, its mask, then for each weights, by name, the
    predicted classes and the pixels that are wrong, in red.

    count: as of `draw_detections`; an image is as good as its mean IoU.
    """
    first = next(iter(predictions.values()))
    quality = {
        i: semantic_scores(counted(images, i, first[i], len(classes)), classes).metrics[MEAN_IOU]
        for i, annotation in enumerate(images.annotations)
        if annotation.names
    }
    colours = np.array([_colour(number, len(classes)) for number in range(len(classes))])
    rows = []
    for position, kind in _chosen(quality, count):
        image, mask = as_picture(images.image(position)), images.mask(position)
        panels = [
            (_small(image), f"{kind}: {images.ids[position]}"),
            (_small(_coloured(image, mask, colours)), _named_classes(mask, classes)),
        ]
        for of_weights in predictions.values():
            found = of_weights[position].numbers()
            wrong = (found != mask) & (mask != IGNORE)
            share = 100 * wrong.sum() / max(1, (mask != IGNORE).sum())
            marked = np.where(wrong, 0, IGNORE).astype(np.uint8)
            panels += [
                (_small(_coloured(image, found, colours)), _named_classes(found, classes)),
                (_small(_coloured(image, marked, _WRONG)), f"{share:.1f} % wrong"),
            ]
        rows.append(_joined(panels))
    titles = [title for name in predictions for title in (name, f"{name}: errors")]
    _draw_sheet(path, ["image", "ground truth", *titles], rows)


def _coloured(
    image: Image.Image, numbers: NDArray[np.uint8], colours: NDArray[np.int64]
) -> Image.Image:
    """The image in grey under the colours of its pixels' classes; none where they are IGNORE."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    shown = numbers != IGNORE
    grey[shown] = 0.4 * grey[shown] + 0.6 * colours[numbers[shown]]
    return Image.fromarray(grey.astype(np.uint8))


def _named_classes(numbers: NDArray[np.uint8], classes: Sequence[str]) -> str:
    """The classes with the most pixels."""
    counts = np.bincount(numbers.reshape(-1), minlength=IGNORE + 1)[: len(classes)]
    most = [i for i in np.argsort(-counts, kind="stable")[:3] if counts[i]]
    return ", ".join(classes[i] for i in most)


def _draw_sheet(path: Path, titles: Sequence[str], rows: Sequence[Image.Image]) -> None:
    width = _GAP + len(titles) * (_LONG_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _HEADER + sum(r.height + _GAP for r in rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        place = (_GAP + column * (_LONG_SIDE + _GAP), _HEADER // 2)
        draw.text(place, one_line(title), _INK, _font(_FONT_SIZE + 2), anchor="lm")
    top = _HEADER
    for row in rows:
        sheet.paste(row, (_GAP, top))
        top += row.height + _GAP
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _chosen(quality: Mapping[int, float], count: int) -> list[tuple[int, str]]:
    """Positions of the images to draw, and why each is drawn. quality: by position."""
    ranked = sorted(quality, key=lambda i: (-quality[i], i))
    third = min(count, len(ranked)) // 3
    chosen = [(i, "best") for i in ranked[:third]]
    chosen += [(i, "worst") for i in ranked[len(ranked) - third :]]
    left = ranked[third : len(ranked) - third] if third else ranked
    random = np.random.default_rng(0).permutation(left)[: min(count, len(ranked)) - 2 * third]
    return [*chosen, *((int(i), "random") for i in random)]


def _quality(truth: Truth, found: Detections) -> float:
    """F1 of the detections that are drawn, at IoU 0.5: used only to choose pictures."""
    shown = np.flatnonzero(found.scores >= _SCORE)
    taken: set[int] = set()
    for i in shown:
        objects = truth.boxes.astype(np.float64)
        iou = pair_iou(np.broadcast_to(found.boxes[i], objects.shape), objects)
        for j in np.argsort(-iou, kind="stable"):
            if iou[j] > 0.5 and truth.labels[j] == found.labels[i] and int(j) not in taken:
                taken.add(int(j))
                break
    return 2 * len(taken) / max(1, len(shown) + len(truth.labels))


@dataclass(frozen=True)
class _Drawn:
    """An object in a picture. box, points: in pixels of the image; points: (K, 2)."""

    box: NDArray[np.floating]
    colour: Colour
    text: str
    points: NDArray[np.floating] | tuple[()] = ()


def _row(
    images: LabelledSet,
    position: int,
    classes: Sequence[str],
    detections: Mapping[str, Sequence[Detections]],
    kind: str,
) -> Image.Image:
    image, annotation = as_picture(images.image(position)), images.annotations[position]
    colours = {name: _colour(number, len(classes)) for number, name in enumerate(classes)}
    labels = [
        _Drawn(
            annotation.boxes[i],
            colours[name],
            f"{name} (difficult)" if annotation.difficult[i] else name,
            () if points is None else points[i, points[i, :, 2] > 0, :2],
        )
        for i, name in enumerate(annotation.names)
        for points in [annotation.keypoints]
    ]
    panels = [(_with_boxes(image, labels), f"{kind}: {annotation.image_id}")]
    for of_weights in detections.values():
        found = of_weights[position]
        shown = np.flatnonzero(found.scores >= _SCORE)[:_MOST]
        labels = [
            _Drawn(
                found.boxes[i],
                colours[name],
                f"{name} {found.scores[i]:.2f}",
                () if found.keypoints is None else found.keypoints[i, :, :2],
            )
            for i in shown
            for name in [classes[found.labels[i]]]
        ]
        panels.append((_with_boxes(image, labels), _caption(found, len(shown), classes)))
    return _joined(panels)


def _joined(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Panels of one size side by side, each over its caption."""
    height = panels[0][0].height
    row = Image.new("RGB", (len(panels) * (_LONG_SIDE + _GAP) - _GAP, height + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(row)
    for column, (panel, caption) in enumerate(panels):
        left = column * (_LONG_SIDE + _GAP)
        row.paste(panel, (left, 0))
        text = one_line(caption)[:_CAPTION_LETTERS]
        draw.text((left, height + _CAPTION // 2), text, _INK, _font(12), anchor="lm")
    return row


def _caption(found: Detections, shown: int, classes: Sequence[str]) -> str:
    if shown:
        above = int(np.count_nonzero(found.scores >= _SCORE))
        return f"{shown} of {above} detections with score {_SCORE} or more"
    if len(found.scores):
        return f"none with score {_SCORE}; best: {classes[found.labels[0]]} {found.scores[0]:.2f}"
    return "no detections"


def _with_boxes(image: Image.Image, labels: Sequence[_Drawn]) -> Image.Image:
    """The image at the pictures' size, with its boxes, keypoints and their texts."""
    scale = _LONG_SIDE / max(image.size)
    panel = _small(image)
    draw = ImageDraw.Draw(panel)
    font = _font(_FONT_SIZE)
    # The most confident comes first; it is drawn last, on top.
    for one in reversed(labels):
        x0, y0, x1, y1 = (float(edge) * scale for edge in one.box)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=one.colour, width=3)
        for point in one.points:
            x, y = ((float(value) + 0.5) * scale for value in point)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=one.colour, outline=_PAPER)
    for one in reversed(labels):
        text, colour = one_line(one.text), one.colour
        x0, y0 = float(one.box[0]) * scale, float(one.box[1]) * scale
        _, _, right, bottom = draw.textbbox((0, 0), text, font)
        x = min(max(0.0, x0), max(0.0, panel.width - right - 6))
        # The text goes above the box if it fits, else inside it.
        y = y0 - bottom - 4 if y0 >= bottom + 4 else max(0.0, y0)
        draw.rectangle((x, y, x + right + 6, y + bottom + 4), fill=colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text((x + 3, y + 1), text, _INK if bright else _PAPER, font)
    return panel


def _small(image: Image.Image) -> Image.Image:
    """The image at the pictures' size."""
    scale = _LONG_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _colour(number: int, total: int) -> Colour:
    """Hues spread evenly over the classes, and alternating in brightness."""
    value = (1.0, 0.8)[number % 2]
    red, green, blue = colorsys.hsv_to_rgb(number / total, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_curves(path: Path, outcomes: Mapping[str, Outcome], metric: str) -> None:
    """A PNG of the training losses, their sum and parts, and of the metric during training and at
    the end.

    One line per weights, by name.
    """
    from matplotlib.figure import Figure

    parts = list(next(iter(outcomes.values())).losses[0].losses)
    figure = Figure(figsize=(14, 6), layout="constrained")
    rows = 2
    columns = 2 + -(-len(parts) // rows)
    grid = figure.add_gridspec(rows, columns)
    total, score = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    small = {
        part: figure.add_subplot(grid[i % rows, 2 + i // rows]) for i, part in enumerate(parts)
    }
    for name, outcome in outcomes.items():
        records = outcome.losses
        iterations = [record.iteration for record in records]
        marker = "o" if len(records) < 3 else ""  # one or two points make no visible line
        total.plot(iterations, [r.total for r in records], marker=marker, label=plot_label(name))
        for part, axis in small.items():
            axis.plot(iterations, [r.losses[part] for r in records], marker=marker)
        curve = [(line["step"], line[metric]) for line in outcome.result.curve]
        curve.append((iterations[-1], outcome.result.metrics[metric]))
        score.plot(
            [step for step, _ in curve],
            [value for _, value in curve],
            marker="o",
            label=plot_label(name),
        )
    titles = {"training loss": total, metric: score, **small}
    for title, axis in titles.items():
        axis.set_title(title.replace("_", " "), fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    total.set_xlabel("iteration")
    score.set_xlabel("iteration")
    total.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
