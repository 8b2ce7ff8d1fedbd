"""Pictures of detections: each box in the colour and line of its verdict, beside the ground truth.

The verdicts are those of `metrics.analysis`, whose counts are in errors.png. Scores of different
weights are not comparable, so each is drawn from the score on that gives it the best F1. Every
verdict has a line of its own besides its colour. Source of the colours: Okabe and Ito (2008),
which people with any colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dupr_cli.artifacts.pixel_formats import as_picture
from dupr_cli.datasets.labelled import Annotation, LabelledSet
from dupr_cli.evaluate.pictures import (
    CAPTION,
    FONT_SIZE,
    GAP,
    HEADER,
    INK,
    PAPER,
    Colour,
    chosen_images,
    draw_sheet,
    font,
    joined,
    small,
)
from dupr_cli.metrics.analysis import Verdicts, best_score, judge
from dupr_cli.metrics.types import Detections, Flags, Truth
from dupr_cli.outside_text import one_line
from dupr_cli.picture_text import shortened_end

_SCREEN = (1900, 1080)  # pixels, width and height that a sheet should not exceed
# Pixels of the longer side of every image, the largest that fits; small images are enlarged.
_SIDES = (400, 360, 320, 280, 220)
_MOST = 60  # detections drawn in an image
_LEGEND = 24  # pixels


@dataclass(frozen=True)
class Line:
    """How boxes of a verdict are drawn. pattern: pixels drawn and left out, in turn; solid if
    empty."""

    title: str
    colour: Colour
    pattern: tuple[int, ...] = ()
    width: int = 3


HIT = Line("found", (0, 158, 115))
DUPLICATE = Line("duplicate", (86, 180, 233), (10, 4, 2, 4))
WRONG_CLASS = Line("wrong class", (204, 121, 167), (14, 4))
FALSE = Line("false: misplaced or on background", (213, 94, 0), (3, 4))
MISSED = Line("missed", (240, 228, 66), (7, 6))
OBJECT = Line("object", (255, 255, 255), (), 2)
IGNORED = Line("not counted: difficult or crowd", (153, 153, 153), (1, 2), 2)
_OF_KIND = {
    "right": HIT,
    "duplicate": DUPLICATE,
    "classification": WRONG_CLASS,
    "localisation": FALSE,
    "both": FALSE,
    "background": FALSE,
    "ignored": IGNORED,
}


@dataclass(frozen=True)
class _Found:
    """The detections of some weights, judged. score: from which on they are drawn."""

    detections: Sequence[Detections]
    verdicts: Sequence[Verdicts]
    score: float

    def shown(self, image: int) -> NDArray[np.intp]:
        return np.flatnonzero(self.detections[image].scores >= self.score)

    def missed(self, image: int, truth: Truth) -> Flags:
        """(n,) objects to find that no detection with the score has found."""
        missed = ~_ignored(truth)
        finds = self.verdicts[image].finds[self.shown(image)]
        missed[finds[finds >= 0]] = False
        return missed

    def quality(self, image: int, truth: Truth) -> float:
        """F1 of the image: used only to choose pictures."""
        kinds = [self.verdicts[image].kinds[i] for i in self.shown(image)]
        counted = sum(kind != "ignored" for kind in kinds)
        objects = int(np.count_nonzero(~_ignored(truth)))
        return float(2 * kinds.count("right") / max(1, counted + objects))


def _ignored(truth: Truth) -> Flags:
    return truth.difficult if truth.crowd is None else truth.difficult | truth.crowd


def draw_detections(
    path: Path,
    images: LabelledSet,
    classes: Sequence[str],
    detections: Mapping[str, Sequence[Detections]],
    count: int,
) -> None:
    """A PNG of images: ground truth, then the detections for each weights, by name.

    count: images drawn: a third best and a third worst for the first weights, a third random.
    """
    truths = [images.truth(i, classes) for i in range(len(images.annotations))]
    found = {name: _judged(truths, of, len(classes)) for name, of in detections.items()}
    first = next(iter(found.values()))
    objects = {i: int(np.count_nonzero(~_ignored(truth))) for i, truth in enumerate(truths)}
    quality = {i: first.quality(i, truths[i]) for i, number in objects.items() if number}
    chosen = [
        (position, kind, as_picture(images.image(position)))
        for position, kind in chosen_images(quality, count, objects)
    ]
    titles = ["ground truth", *(_title(name, of) for name, of in found.items())]
    side, across = _layout(len(titles), [image.size for *_, image in chosen])
    groups = []
    for position, kind, image in chosen:
        truth, annotation = truths[position], images.annotations[position]
        truly = _with_boxes(image, _objects(annotation, truth), side)
        panels = [(truly, f"{kind}: {annotation.image_id}")]
        for of in found.values():
            drawn, caption = _judged_objects(of, position, truth, classes)
            panels.append((_with_boxes(image, drawn, side), caption))
        groups.append(joined(panels, side))
    draw_sheet(path, titles, side, groups, across, _legend())


def _title(name: str, found: _Found) -> str:
    return f"{name}: " + (f"score from {found.score:.2f}" if found.score < 2 else "no detections")


def _layout(columns: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The side of the images and how many groups of `columns` panels stand side by side.

    sizes: width and height of each image. The smallest side if no layout fits a screen.
    """
    for side in _SIDES:
        across = max(1, min(len(sizes), (_SCREEN[0] - GAP) // (columns * (side + GAP))))
        rows = [sizes[i : i + across] for i in range(0, len(sizes), across)]
        height = (
            HEADER
            + _LEGEND
            + sum(max(h * side / max(w, h) for w, h in row) + CAPTION + GAP for row in rows)
        )
        if across * columns * (side + GAP) <= _SCREEN[0] and height <= _SCREEN[1]:
            break
    return side, across


def _judged(truths: Sequence[Truth], detections: Sequence[Detections], classes: int) -> _Found:
    verdicts = judge(truths, detections, classes)
    objects = sum(int(np.count_nonzero(~_ignored(truth))) for truth in truths)
    return _Found(detections, verdicts, best_score(verdicts, detections, objects))


@dataclass(frozen=True)
class _Drawn:
    """An object in a picture. box, points: in pixels of the image; points: (K, 2)."""

    box: NDArray[np.floating]
    line: Line
    text: str
    points: NDArray[np.floating] | tuple[()] = ()


def _objects(annotation: Annotation, truth: Truth) -> list[_Drawn]:
    points = annotation.keypoints
    return [
        _Drawn(
            annotation.boxes[i],
            IGNORED if ignored else OBJECT,
            name,
            () if points is None else points[i, points[i, :, 2] > 0, :2],
        )
        for i, (name, ignored) in enumerate(zip(annotation.names, _ignored(truth), strict=True))
    ]


def _judged_objects(
    of: _Found, position: int, truth: Truth, classes: Sequence[str]
) -> tuple[list[_Drawn], str]:
    """Detections and missed objects of an image, and their numbers in words."""
    found, kinds, shown = of.detections[position], of.verdicts[position].kinds, of.shown(position)
    missed = of.missed(position, truth)
    drawn = [
        _Drawn(
            found.boxes[i],
            _OF_KIND[kinds[i]],
            f"{classes[found.labels[i]]} {found.scores[i]:.2f}",
            () if found.keypoints is None else found.keypoints[i, :, :2],
        )
        for i in shown[:_MOST]
    ]
    drawn += [
        _Drawn(truth.boxes[j], MISSED, classes[truth.labels[j]]) for j in np.flatnonzero(missed)
    ]
    lines = [_OF_KIND[kinds[i]] for i in shown]
    counts = [
        (lines.count(HIT), "found"), (int(np.count_nonzero(missed)), "missed"),
        (lines.count(FALSE), "false"), (lines.count(WRONG_CLASS), "wrong class"),
        (lines.count(DUPLICATE), "duplicate"),
    ]  # fmt: skip
    texts = [f"{number} {name}" for number, name in counts if number]
    return drawn, ", ".join(texts) or "nothing to find, nothing found"


def _with_boxes(image: Image.Image, objects: Sequence[_Drawn], side: int) -> Image.Image:
    """The image with this longer side, with its boxes, keypoints and their texts."""
    scale = side / max(image.size)
    panel = small(image, side)
    draw = ImageDraw.Draw(panel)
    # The most confident comes first; it is drawn last, on top.
    for one in reversed(objects):
        box = (np.asarray(one.box, dtype=np.float64) * scale).tolist()
        _draw_box(draw, box, one.line, panel.size)
        for point in one.points:
            x, y = ((float(value) + 0.5) * scale for value in point)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=one.line.colour, outline=INK)
    taken: list[tuple[float, float, float, float]] = []
    for one in objects:
        _tag(draw, one, scale, panel.size, taken)
    return panel


def _draw_box(
    draw: ImageDraw.ImageDraw, box: Sequence[float], line: Line, size: tuple[int, int]
) -> None:
    """A box within the picture, on a dark edge that keeps it visible on any image."""
    width, height = size
    half = line.width / 2
    # Whole lines stay inside: a box at the edge would lose half of its line.
    x0, y0 = max(box[0], half), max(box[1], half)
    x1, y1 = max(x0, min(box[2], width - half) - 1), max(y0, min(box[3], height - half) - 1)
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    for part in _dashes(corners, line.pattern):
        draw.line(part, INK, line.width + 2)
    for part in _dashes(corners, line.pattern):
        draw.line(part, line.colour, line.width)


def _dashes(
    corners: Sequence[tuple[float, float]], pattern: Sequence[int]
) -> Iterator[list[tuple[float, float]]]:
    """The drawn parts of the sides; a pattern begins again at every corner."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        length = max(abs(x1 - x0), abs(y1 - y0))
        if not pattern or length == 0:
            yield [(x0, y0), (x1, y1)]
            continue
        at, number = 0.0, 0
        while at < length:
            end = min(length, at + pattern[number % len(pattern)])
            if number % 2 == 0:
                start_share, end_share = at / length, end / length
                yield [
                    (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
                    for share in (start_share, end_share)
                ]
            at, number = end, number + 1


def _tag(
    draw: ImageDraw.ImageDraw,
    one: _Drawn,
    scale: float,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write an object's text at its box: above, below or inside, where no earlier text is.

    A text without a free place is left out; the line still says what the box is.
    taken: the places of the texts so far, extended here.
    """
    letters = font(FONT_SIZE - 2)
    text = shortened_end(one_line(one.text), letters, size[0] - 6)
    _, _, right, bottom = draw.textbbox((0, 0), text, letters)
    width, height = right + 5, bottom + 3
    x0, y0, x1, y1 = (float(edge) * scale for edge in one.box)
    rows = (y0 - height, y1, y0, y1 - height)
    for x in (x0, x1 - width):
        for y in rows:
            left = min(max(0.0, x), max(0.0, size[0] - width))
            top = min(max(0.0, y), max(0.0, size[1] - height))
            place = (left, top, left + width, top + height)
            if not any(_overlap(place, other) for other in taken):
                taken.append(place)
                draw.rectangle(place, fill=one.line.colour)
                red, green, blue = one.line.colour
                bright = 0.299 * red + 0.587 * green + 0.114 * blue > 120
                draw.text((left + 3, top + 1), text, INK if bright else PAPER, letters)
                return


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend() -> Image.Image:
    """One row: a piece of each line with its name."""
    letters, lines = font(FONT_SIZE), (HIT, MISSED, DUPLICATE, WRONG_CLASS, FALSE, IGNORED)
    piece = 56
    widths = [piece + 8 + int(letters.getlength(line.title)) + 22 for line in lines]
    legend = Image.new("RGB", (sum(widths), _LEGEND), PAPER)
    draw = ImageDraw.Draw(legend)
    left = 0
    for line, width in zip(lines, widths, strict=True):
        y = _LEGEND / 2
        for start, end in _dashes([(left, y), (left + piece, y)], line.pattern):
            draw.line([start, end], INK, line.width + 2)
            draw.line([start, end], line.colour, line.width)
        draw.text((left + piece + 8, y), line.title, INK, letters, anchor="lm")
        left += width
    return legend
