"""Each detection is drawn in the colour and line of its verdict, within the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.detection_pictures import (
    DUPLICATE,
    FALSE,
    HIT,
    IGNORED,
    MISSED,
    OBJECT,
    WRONG_CLASS,
    Line,
    draw_detections,
)
from dupr_cli.evaluate.pictures import FONT_SIZE, GAP, HEADER, chosen_images
from dupr_cli.metrics import Detections
from dupr_cli.progress import SilentReporter
from tests.support.labelled_scenes import KitObject, add_image, add_split, annotation_xml

CLASSES = ["blue", "green", "red"]
SIDE = 400  # of a picture with few images
TOP = HEADER + 24 + GAP  # below the legend and the titles
LEFT, UPPER = ("green", 11, 11, 40, 40), ("red", 61, 11, 90, 40)
LOWER = ("blue", 11, 51, 40, 68)
# Where a box begins in the picture, from the pixels of an image of 96 x 72.
SCALE = SIDE / 96

Row = tuple[str, tuple[float, float, float, float], float]


def image_set(
    root: Path, objects: list[KitObject], difficult: Sequence[KitObject] = ()
) -> LabelledSet:
    """One image. difficult: further objects, with VOC's flag."""
    add_image(root, "img", [*objects, *difficult])
    flagged = annotation_xml([*difficult], difficult=True).removeprefix("<annotation>")
    plain = annotation_xml(objects).removesuffix("</annotation>")
    (root / "Annotations" / "img.xml").write_text(plain + flagged)
    add_split(root, "val", ["img"])
    return open_labelled(str(root), ["val"], SilentReporter())


def detections(*rows: Row) -> Detections:
    """Boxes as VOC counts, from the most confident on."""
    boxes = np.array([[x0 - 1, y0 - 1, x1, y1] for _, (x0, y0, x1, y1), _ in rows], float)
    labels = np.array([CLASSES.index(name) for name, *_ in rows], dtype=np.int64)
    return Detections(boxes.reshape(-1, 4), labels, np.array([score for *_, score in rows]))


def drawn(
    tmp_path: Path, objects: list[KitObject], *rows: Row, difficult: Sequence[KitObject] = ()
) -> NDArray[np.uint8]:
    """The panel of the detections."""
    images = image_set(tmp_path / "tree", objects, difficult)
    path = tmp_path / "detections.png"
    draw_detections(path, images, CLASSES, {"weights": [detections(*rows)]}, 3)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    left = 2 * GAP + SIDE
    return pixels[TOP : TOP + SIDE * 72 // 96, left : left + SIDE]


def pixels_of(panel: NDArray[np.uint8], line: Line) -> int:
    return int((panel == line.colour).all(axis=-1).sum())


def side_of(panel: NDArray[np.uint8], line: Line, box: Sequence[float]) -> float:
    """The share of a box's right side that is drawn in the line's colour."""
    x = round(box[2] * SCALE) - 1
    rows = slice(round((box[1] - 1) * SCALE) + 6, round(box[3] * SCALE) - 6)
    strip = (panel[rows, x - 2 : x + 2] == line.colour).all(axis=-1)
    return float(strip.any(axis=1).mean())


LINES = (HIT, DUPLICATE, WRONG_CLASS, FALSE, MISSED, IGNORED)
BOX = LEFT[1:]
# Its overlap with the object is 25 / 35.
BESIDE = (16, 11, 45, 40)


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([("green", BOX, 0.9)], {HIT}),
        ([("green", BOX, 0.9), ("green", BESIDE, 0.8)], {HIT, DUPLICATE}),
        ([("red", BOX, 0.9)], {WRONG_CLASS, MISSED}),
        ([("green", (56, 45, 85, 68), 0.9)], {FALSE, MISSED}),  # on background
        ([("green", (31, 11, 60, 40), 0.9)], {FALSE, MISSED}),  # overlap 10 / 50
        ([], {MISSED}),
    ],
)
def test_every_kind_has_its_colour(tmp_path: Path, rows: list[Row], kinds: set[Line]) -> None:
    # A second object is found, so that the best score of the rest does not leave them out.
    more: Row = ("blue", LOWER[1:], 0.5)
    panel = drawn(tmp_path, [LEFT, LOWER], *rows, more)
    found = {line for line in LINES if pixels_of(panel, line)}
    assert found == kinds | {HIT}


def test_what_is_on_a_difficult_object_is_neither_found_nor_false(tmp_path: Path) -> None:
    rows: list[Row] = [("green", BOX, 0.9), ("blue", LOWER[1:], 0.5)]
    panel = drawn(tmp_path, [LOWER], *rows, difficult=[LEFT])
    assert {line for line in LINES if pixels_of(panel, line)} == {HIT, IGNORED}
    assert side_of(panel, HIT, BOX) == 0


def test_images_without_an_object_to_find_are_not_drawn(tmp_path: Path) -> None:
    images = image_set(tmp_path / "tree", [], difficult=[LEFT])
    add_image(tmp_path / "tree", "other", [UPPER])
    add_split(tmp_path / "tree", "val", ["img", "other"])
    images = open_labelled(str(tmp_path / "tree"), ["val"], SilentReporter())
    found = [detections(("green", BOX, 0.9)), detections(("red", UPPER[1:], 0.8))]
    draw_detections(tmp_path / "d.png", images, CLASSES, {"weights": found}, 3)
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.height < TOP + SIDE


@pytest.mark.parametrize(
    ("name", "line", "low", "high"),
    [("green", HIT, 0.98, 1.0), ("red", WRONG_CLASS, 0.5, 0.95)],
)
def test_lines_differ_besides_their_colours(
    tmp_path: Path, name: str, line: Line, low: float, high: float
) -> None:
    more: Row = ("blue", LOWER[1:], 0.5)
    panel = drawn(tmp_path, [LEFT, LOWER], (name, BOX, 0.9), more)
    assert low <= side_of(panel, line, BOX) <= high
    patterns = [each.pattern for each in LINES]
    assert len(set(patterns)) == len(patterns)


def test_missed_objects_are_dashed(tmp_path: Path) -> None:
    panel = drawn(tmp_path, [LEFT, LOWER], ("blue", LOWER[1:], 0.5))
    assert 0.3 < side_of(panel, MISSED, BOX) < 0.8


def test_low_scores_are_left_out_and_what_only_they_found_is_missed(tmp_path: Path) -> None:
    """The best F1 is without the many false ones, and the object found below them."""
    false: list[Row] = [("green", (60, 45, 70, 55), 0.3)] * 6
    panel = drawn(tmp_path, [LEFT, LOWER], ("blue", LOWER[1:], 0.5), *false, ("green", BOX, 0.1))
    assert not pixels_of(panel, FALSE)
    assert pixels_of(panel, MISSED)


def test_colours_are_those_of_okabe_and_ito() -> None:
    """As published: bluish green, sky blue, reddish purple, vermilion, yellow."""
    published = {"009e73", "56b4e9", "cc79a7", "d55e00", "f0e442"}
    lines = (HIT, DUPLICATE, WRONG_CLASS, FALSE, MISSED)
    assert {bytes(line.colour).hex() for line in lines} == published


@pytest.mark.parametrize(
    "box", [(1, 1, 96, 72), (90, 1, 96, 8), (1, 66, 8, 72), (90, 66, 96, 72), (60, 40, 130, 90)]
)
def test_boxes_and_texts_end_within_the_picture(tmp_path: Path, box: tuple[int, ...]) -> None:
    """The text's ground is a whole rectangle: wider than high, with its letters."""
    x0, y0, x1, y1 = box
    rows: list[Row] = [("green", (x0, y0, x1, y1), 0.9), ("blue", LOWER[1:], 0.8)]
    panel = drawn(tmp_path, [LOWER], *rows)
    of_line = (panel == FALSE.colour).all(axis=-1)
    filled = np.flatnonzero(of_line.sum(axis=1) > 25)
    assert len(filled) >= FONT_SIZE - 2
    # Lines on all sides of the box that are within the image.
    ys, xs = np.nonzero(of_line)
    assert ys.min() <= (y0 - 1) * SCALE + 4
    assert xs.max() >= min(SIDE, x1 * SCALE) - 6


def test_the_ground_truth_is_beside_it(tmp_path: Path) -> None:
    drawn(tmp_path, [LEFT, LOWER], ("blue", LOWER[1:], 0.5))
    with Image.open(tmp_path / "detections.png") as picture:
        truth = np.asarray(picture.convert("RGB"))[TOP : TOP + 300, GAP : GAP + SIDE]
    assert side_of(truth, OBJECT, BOX) > 0.9
    assert side_of(truth, OBJECT, LOWER[1:]) > 0.9


def test_a_sheet_fits_a_screen(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    ids = [f"img{number}" for number in range(8)]
    for number, image_id in enumerate(ids):
        add_image(root, image_id, [LEFT], (96, 72) if number % 2 else (72, 96))
    add_split(root, "val", ids)
    images = open_labelled(str(root), ["val"], SilentReporter())
    found = [detections(("green", BOX, 0.9))] * len(ids)
    for weights in (1, 2, 3):
        named = {f"w{number}": found for number in range(weights)}
        draw_detections(tmp_path / "d.png", images, CLASSES, named, 6)
        with Image.open(tmp_path / "d.png") as picture:
            assert picture.width <= 1900
            assert picture.height <= 1080


def test_of_equally_good_images_those_with_more_objects_are_drawn() -> None:
    quality = {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 0.5}
    chosen = chosen_images(quality, 3, {0: 1, 1: 5, 2: 1, 3: 4, 4: 2})
    assert chosen[:2] == [(1, "best"), (3, "worst")]
    assert len({position for position, _ in chosen}) == 3


def test_few_images_are_drawn_once() -> None:
    assert sorted(chosen_images({3: 1.0, 5: 0.5}, 6)) == [(3, "random"), (5, "random")]
