"""The demo's generated data set: reproducible, labelled truly, and a real VOC tree."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.ft2font import FT2Font
from PIL import Image

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.voc import VocTree
from dupr_cli.demo import scenes
from dupr_cli.demo.scenes import (
    CLASSES,
    DISTRACTORS,
    LARGEST,
    SIDE,
    SMALLEST,
    render_scene,
    scene_files,
    voc_tree_files,
    write_unlabelled,
    write_voc_tree,
)

COUNTS = {"train": 35, "val": 4}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc") / "VOC2007"
    write_voc_tree(root, COUNTS, seed=3)
    return root


@pytest.fixture
def every_glyph_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "DISTRACTORS", tuple(CLASSES))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shared(a: Box, b: Box) -> float:
    """Area of the intersection of two boxes, pixels."""
    across = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    down = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    return max(0, across) * max(0, down)


def test_the_font_has_every_glyph() -> None:
    font = FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    glyphs = [*CLASSES.values(), *DISTRACTORS]
    # Glyph 0 is the box that stands for a missing character.
    assert all(font.get_char_index(ord(glyph)) > 0 for glyph in glyphs)
    assert len(set(glyphs)) == len(glyphs)


def test_workers_write_the_same_bytes_as_one_process(tree: Path, tmp_path: Path) -> None:
    again = tmp_path / "VOC2007"
    write_voc_tree(again, COUNTS, seed=3, workers=2)
    expected = {again / path.relative_to(tree): data for path, data in contents(tree).items()}
    assert contents(again) == expected


def test_every_seed_split_and_index_has_its_own_scene() -> None:
    places = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1), (-1, "train", 0)]
    assert len({render_scene(*place)[0].tobytes() for place in places}) == len(places)


@pytest.mark.parametrize("workers", [0, 2])
def test_unlabelled_scenes_are_counted_from_zero_and_reported(tmp_path: Path, workers: int) -> None:
    written: list[int] = []
    write_unlabelled(tmp_path, 34, seed=0, workers=workers, on_progress=written.append)
    assert sorted(contents(tmp_path)) == [tmp_path / f"scene-{n:06d}.jpg" for n in range(34)]
    assert sum(written) == 34


def test_unlabelled_files_hold_the_rendered_scenes(tmp_path: Path) -> None:
    write_unlabelled(tmp_path, 2, seed=5)
    rendered, _ = render_scene(5, "unlabelled", 1)
    with Image.open(tmp_path / "scene-000001.jpg") as stored:
        assert (stored.format, stored.size, stored.mode) == ("JPEG", (SIDE, SIDE), "RGB")
        difference = np.asarray(stored, np.float32) - np.asarray(rendered, np.float32)
    # JPEG's rounding leaves about 3 levels; the mean difference of two scenes is about 50.
    assert np.abs(difference).mean() < 5


def test_listed_files_are_those_that_are_written(tree: Path, tmp_path: Path) -> None:
    write_unlabelled(tmp_path, 3, seed=0)
    assert set(contents(tmp_path)) == set(scene_files(tmp_path, 3))
    assert set(contents(tree)) == set(voc_tree_files(tree, COUNTS))


@pytest.mark.usefixtures("every_glyph_is_labelled")
@pytest.mark.parametrize("index", range(40))
def test_boxes_are_tight_around_the_pixels_of_glyphs(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    # White glyphs on black without noise: the picture itself shows what each pixel belongs to.
    monkeypatch.setattr(scenes, "_NOISE", 0)
    monkeypatch.setattr(scenes, "_ground", lambda rng: np.zeros((SIDE, SIDE, 3), np.float32))
    monkeypatch.setattr(scenes, "_fill", lambda rng, below, mask: np.full_like(below, 255))
    picture, boxes = render_scene(2, "val", index)
    white = np.asarray(picture)[..., 0] >= 128
    outside = white.copy()
    for box in boxes:
        x_min, y_min, x_max, y_max = map(int, box.corners)
        inside = white[y_min:y_max, x_min:x_max]
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        outside[y_min:y_max, x_min:x_max] = False
    assert not outside.any()


@pytest.mark.usefixtures("every_glyph_is_labelled")
def test_glyphs_have_their_size_and_hardly_overlap() -> None:
    counts = Counter[int]()
    for index in range(300):
        _, boxes = render_scene(7, "train", index)
        counts[len(boxes)] += 1
        for box in boxes:
            sides = box.x_max - box.x_min, box.y_max - box.y_min
            # Narrow tips that cover less than half of their pixels lie outside the box.
            assert SMALLEST - 4 <= max(sides) <= LARGEST
        for a, b in combinations(boxes, 2):
            areas = [(box.x_max - box.x_min) * (box.y_max - box.y_min) for box in (a, b)]
            # A tenth of a square may be a fifth of the flat box in it.
            assert shared(a, b) <= 0.25 * min(areas)
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 50


def test_glyphs_stand_out_from_the_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, differences = scenes._fill, []

    def noted(rng: scenes._Rng, below: scenes._Floats, mask: scenes._Floats) -> scenes._Floats:
        colours = fill(rng, below, mask)
        differences.append(np.average(np.abs(colours - below).mean(2), weights=mask))
        return colours

    monkeypatch.setattr(scenes, "_fill", noted)
    for index in range(50):
        render_scene(4, "train", index)
    assert min(differences) >= 79.9


@settings(max_examples=50)
@given(st.integers(-(2**40), 2**40), st.sampled_from(["train", "val"]), st.integers(0, 10**6))
def test_every_scene_has_a_labelled_object_inside_it(seed: int, split: str, index: int) -> None:
    picture, boxes = render_scene(seed, split, index)
    assert picture.size == (SIDE, SIDE)
    assert 1 <= len(boxes) <= 5
    for box in boxes:
        assert 0 <= box.x_min < box.x_max <= SIDE
        assert 0 <= box.y_min < box.y_max <= SIDE


def test_classes_are_about_equally_frequent() -> None:
    names = Counter(box.name for index in range(300) for box in render_scene(11, "train", index)[1])
    assert set(names) == set(CLASSES)
    # About 115 of each are expected, with a standard deviation of 10.
    assert max(names.values()) < 1.6 * min(names.values())


def test_the_voc_reader_gives_back_every_label(tree: Path) -> None:
    reader = VocTree(tree)
    assert reader.splits == sorted(COUNTS)
    for split, count in COUNTS.items():
        assert reader.image_ids(split) == [f"{split}_{index:06d}" for index in range(count)]
        for index, key in enumerate(reader.image_ids(split)):
            labels = reader.labels(key)
            assert list(labels.boxes) == render_scene(3, split, index)[1]
            assert labels.size == (SIDE, SIDE)
            assert reader.image_path(key).name == f"{key}.jpg"


def test_voc_boxes_count_from_one_and_include_both_ends(tree: Path) -> None:
    annotation = (tree / "Annotations" / "val_000000.xml").read_text()
    box = render_scene(3, "val", 0)[1][0]
    # Half-open x_max counted from 0 is the same number as inclusive xmax counted from 1.
    assert f"<xmin>{box.x_min + 1}</xmin><ymin>{box.y_min + 1}</ymin>" in annotation
    assert f"<xmax>{box.x_max}</xmax><ymax>{box.y_max}</ymax>" in annotation
