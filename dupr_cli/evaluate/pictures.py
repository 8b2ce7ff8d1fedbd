"""Pictures of an evaluation: sheets of images, predicted classes of pixels, and curves."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.pixel_formats import as_picture
from dupr_cli.datasets.semantic import SemanticSet
from dupr_cli.evaluate.class_maps import Prediction, counted
from dupr_cli.metrics.semantic import IGNORE, MEAN_IOU, semantic_scores
from dupr_cli.outside_text import one_line, plot_label
from dupr_cli.picture_text import shortened_end

if TYPE_CHECKING:
    from dupr_cli.evaluate.trials import Outcome

Colour = tuple[int, int, int]

_LONG_SIDE = 360  # pixels of every picture; small images are enlarged
GAP = 10
HEADER = 28
CAPTION = 22
FONT_SIZE = 14
PAPER, INK = (255, 255, 255), (20, 20, 20)
_WRONG = np.array([[220, 20, 20]])
# Colours that people with any colour vision can tell apart (Okabe and Ito, 2008), without black.
_TOLD_APART = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (240, 228, 66), (86, 180, 233), (213, 94, 0),
    (204, 121, 167),
)  # fmt: skip


def draw_class_maps(
    path: Path,
    images: SemanticSet,
    classes: Sequence[str],
    predictions: Mapping[str, Sequence[Prediction]],
    count: int,
) -> None:
    """A PNG with one row per image: the image, its mask, then for each weights, by name, the
    predicted classes and the pixels that are wrong, in red.

    count: as of `detection_pictures.draw_detections`; an image is as good as its mean IoU.
    """
    first = next(iter(predictions.values()))
    quality = {
        i: semantic_scores(counted(images, i, first[i], len(classes)), classes).metrics[MEAN_IOU]
        for i, annotation in enumerate(images.annotations)
        if annotation.names
    }
    colours = np.array([_colour(number, len(classes)) for number in range(len(classes))])
    rows = []
    for position, kind in chosen_images(quality, count):
        image, mask = as_picture(images.image(position)), images.mask(position)
        panels = [
            (small(image), f"{kind}: {images.ids[position]}"),
            (small(_coloured(image, mask, colours)), _named_classes(mask, classes)),
        ]
        for of_weights in predictions.values():
            found = of_weights[position].numbers()
            wrong = (found != mask) & (mask != IGNORE)
            share = 100 * wrong.sum() / max(1, (mask != IGNORE).sum())
            marked = np.where(wrong, 0, IGNORE).astype(np.uint8)
            panels += [
                (small(_coloured(image, found, colours)), _named_classes(found, classes)),
                (small(_coloured(image, marked, _WRONG)), f"{share:.1f} % wrong"),
            ]
        rows.append(joined(panels))
    titles = [title for name in predictions for title in (name, f"{name}: errors")]
    titles = ["image", "ground truth", *titles]
    legend = _legend(classes, colours, len(titles) * (_LONG_SIDE + GAP) - GAP)
    draw_sheet(path, titles, _LONG_SIDE, rows, legend=legend)


def _legend(
    classes: Sequence[str], colours: NDArray[np.int64], width: int, most: int = 40
) -> Image.Image:
    """Rows of this width: a square of each class's colour, as it is on grey, with its name; of at
    most this many classes."""
    letters, side = font(FONT_SIZE), 16
    places, left, top = [], 0, 0
    shown = [shortened_end(one_line(name), letters, width - side - 8) for name in classes[:most]]
    for name in shown:
        needed = side + 8 + int(letters.getlength(name)) + 22
        if left and left + needed > width:
            left, top = 0, top + side + 6
        places.append((left, top))
        left += needed
    legend = Image.new("RGB", (width, top + side), PAPER)
    draw = ImageDraw.Draw(legend)
    for name, (x, y), colour in zip(shown, places, colours, strict=False):
        red, green, blue = (round(0.4 * 128 + 0.6 * part) for part in colour)
        draw.rectangle((x, y, x + side, y + side - 1), fill=(red, green, blue))
        draw.text((x + side + 8, y + side // 2), name, INK, letters, anchor="lm")
    return legend


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


def draw_sheet(
    path: Path,
    titles: Sequence[str],
    side: int,
    rows: Sequence[Image.Image],
    across: int = 1,
    legend: Image.Image | None = None,
) -> None:
    """Write rows of panels of this side under their titles, `across` rows beside one another."""
    lines = [rows[i : i + across] for i in range(0, len(rows), across)]
    wide = len(titles) * (side + GAP)
    width = GAP + across * wide
    above = HEADER
    if legend is not None:
        width, above = max(width, legend.width + 2 * GAP), above + legend.height + GAP
    height = above + sum(max(row.height for row in line) + GAP for line in lines)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if legend is not None:
        sheet.paste(legend, (GAP, GAP))
    letters = font(FONT_SIZE + 2)
    for column, title in enumerate([*titles] * across):
        place = (GAP + column * (side + GAP), above - HEADER // 2)
        draw.text(place, shortened_end(one_line(title), letters, side), INK, letters, anchor="lm")
    top = above
    for line in lines:
        for column, row in enumerate(line):
            sheet.paste(row, (GAP + column * wide, top))
        top += max(row.height for row in line) + GAP
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def chosen_images(
    quality: Mapping[int, float], count: int, objects: Mapping[int, int] | None = None
) -> list[tuple[int, str]]:
    """Positions of the images to draw, and why each is drawn. quality: by position. objects: their
    numbers, of which equally good and equally bad images with many are preferred."""
    number = objects or dict.fromkeys(quality, 0)
    third = min(count, len(quality)) // 3
    best = sorted(quality, key=lambda i: (-quality[i], -number[i], i))[:third]
    others = [i for i in quality if i not in best]
    worst = sorted(others, key=lambda i: (quality[i], -number[i], i))[:third]
    left = sorted(set(others) - set(worst))
    random = np.random.default_rng(0).permutation(left)[: min(count, len(quality)) - 2 * third]
    kinds = (("best", best), ("worst", worst), ("random", random))
    return [(int(i), kind) for kind, positions in kinds for i in positions]


def joined(panels: Sequence[tuple[Image.Image, str]], side: int = _LONG_SIDE) -> Image.Image:
    """Panels of one size side by side, each over its caption."""
    height = panels[0][0].height
    row = Image.new("RGB", (len(panels) * (side + GAP) - GAP, height + CAPTION), PAPER)
    draw, letters = ImageDraw.Draw(row), font(12)
    for column, (panel, caption) in enumerate(panels):
        left = column * (side + GAP)
        row.paste(panel, (left, 0))
        text = shortened_end(one_line(caption), letters, side)
        draw.text((left, height + CAPTION // 2), text, INK, letters, anchor="lm")
    return row


def small(image: Image.Image, side: int = _LONG_SIDE) -> Image.Image:
    """The image with a longer side of this many pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _colour(number: int, total: int) -> Colour:
    """Colours that all people can tell apart, of many classes also darker. For more classes than
    that, hues spread evenly over them and alternating in brightness."""
    shade, place = divmod(number, len(_TOLD_APART))
    if total <= 2 * len(_TOLD_APART):
        red, green, blue = _TOLD_APART[place]
        return (red, green, blue) if shade == 0 else (red // 2, green // 2, blue // 2)
    value = (1.0, 0.8)[number % 2]
    hue = colorsys.hsv_to_rgb(number / total, 0.85, value)
    return round(255 * hue[0]), round(255 * hue[1]), round(255 * hue[2])


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_curves(path: Path, outcomes: Mapping[str, Outcome], metric: str) -> None:
    """A PNG of the training losses, their sum and parts, and of the metric during training and at
    the end.

    One line per weights, by name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
            clip_on=False,  # a point at 0 is drawn whole
            label=plot_label(name),
        )
    titles = {"training loss": total, metric: score, **small}
    for title, axis in titles.items():
        axis.set_title(title.replace("_", " "), fontsize=10)
        # From 0 on, and with room above the highest point even if all are equal.
        axis.set_ylim(0, 1.08 * (axis.dataLim.y1 if axis.dataLim.y1 > 0 else 1))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    total.set_xlabel("iteration")
    score.set_xlabel("iteration")
    total.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
