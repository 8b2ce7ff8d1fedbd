"""The demo's generated data set: reproducible, labelled truly, and a real VOC tree."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dupr_cli.datasets.voc import VocTree
from dupr_cli.demo.canvas import Light
from dupr_cli.demo.scenes import (
    CLASSES,
    SceneObject,
    _compose,
    _presence,
    render_scene,
    write_unlabelled,
    write_voc_tree,
)
from dupr_cli.demo.shapes import KINDS, draw
from dupr_cli.demo.textures import Palette

COUNTS = {"train": 35, "val": 4}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc") / "VOC2007"
    write_voc_tree(root, COUNTS, seed=3)
    return root


@pytest.fixture(scope="module")
def hundred() -> list[list[SceneObject]]:
    return [render_scene(11, "train", index)[1] for index in range(100)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_workers_write_the_same_bytes_as_one_process(tree: Path, tmp_path: Path) -> None:
    again = tmp_path / "VOC2007"
    write_voc_tree(again, COUNTS, seed=3, workers=2)
    assert contents(again) == contents(tree)


def test_unlabelled_scenes_are_counted_from_zero_and_reported(tmp_path: Path) -> None:
    written: list[int] = []
    write_unlabelled(tmp_path, 34, seed=0, size=64, on_progress=written.append)
    assert sorted(contents(tmp_path)) == [f"scene-{number:06d}.jpg" for number in range(34)]
    assert sum(written) == 34


def test_unlabelled_files_hold_the_rendered_scenes(tmp_path: Path) -> None:
    write_unlabelled(tmp_path, 2, seed=5)
    rendered, _ = render_scene(5, "unlabelled", 1)
    with Image.open(tmp_path / "scene-000001.jpg") as stored:
        assert (stored.format, stored.size, stored.mode) == ("JPEG", (160, 160), "RGB")
        difference = np.asarray(stored, np.float32) - np.asarray(rendered, np.float32)
    # Quality 92 with halved colour resolution leaves about 5 levels; another scene is 60 away.
    assert np.abs(difference).mean() < 15


@settings(max_examples=25)
@given(st.integers(-(2**40), 2**40), st.sampled_from(["train", "val"]), st.integers(0, 10**6))
def test_labels_lie_in_the_image_and_objects_can_be_recognised(
    seed: int, split: str, index: int
) -> None:
    picture, placed = _compose(seed, split, index, 96)
    _, objects = render_scene(seed, split, index, 96)
    assert picture.size == (96, 96)
    # Four are wanted at most, and none is dropped from the labels.
    assert 1 <= len(objects) == len(placed) <= 4
    for label, thing in zip(objects, placed, strict=True):
        x_min, y_min, x_max, y_max = label.box
        assert 0 <= x_min < x_max <= 96
        assert 0 <= y_min < y_max <= 96
        assert thing.seen.sum() >= 0.249 * thing.area


def test_boxes_are_tight_around_the_silhouette() -> None:
    for index in range(20):
        _, placed = _compose(2, "val", index, 160)
        _, objects = render_scene(2, "val", index)
        for label, thing in zip(objects, placed, strict=True):
            x_min, y_min, x_max, y_max = label.box
            covered = thing.silhouette >= 0.4
            assert covered.sum() == covered[y_min:y_max, x_min:x_max].sum()
            sides = covered[y_min:y_max, x_min], covered[y_min:y_max, x_max - 1]
            ends = covered[y_min, x_min:x_max], covered[y_max - 1, x_min:x_max]
            assert all(edge.any() for edge in (*sides, *ends))


def test_a_silhouette_covers_what_is_painted_and_nothing_else() -> None:
    # The same wheel in two colours differs exactly where it is: a look at the paint itself.
    sprites = [
        draw("wheel", 60.0, np.random.default_rng(4), palette, Light((0.0, -0.6, 0.8), 0.5))
        for palette in (Palette(0.0, 0.0, 0.8), Palette(0.66, 0.0, 0.8))
    ]
    changed = np.abs(sprites[0].colour - sprites[1].colour).max(0) > 1e-6
    assert np.array_equal(changed, sprites[0].coverage > 1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_drawn_things_have_about_the_size_asked_for_and_are_whole(name: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(25):
        side = rng.uniform(29, 96)
        coverage = draw(name, side, rng, Palette.draw(rng), Light.draw(rng)).coverage
        rows, columns = np.nonzero(coverage >= 0.4)
        assert 0.7 * side < max(np.ptp(rows), np.ptp(columns)) + 1 < 1.3 * side
        rim = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert rim.max() == 0, "the canvas is too small for this thing"


def test_drawing_stays_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    for name in KINDS:
        sprite = draw(name, 40, rng, Palette.draw(rng), Light.draw(rng))
        assert sprite.colour.dtype == sprite.coverage.dtype == np.float32
        assert np.isfinite(sprite.colour).all()


@pytest.mark.slow
def test_every_class_appears_in_a_hundred_scenes(hundred: list[list[SceneObject]]) -> None:
    names = [item.name for objects in hundred for item in objects]
    assert set(names) == set(CLASSES)
    assert min(names.count(name) for name in CLASSES) >= 15


def test_some_objects_are_truncated_and_few_are_difficult(
    hundred: list[list[SceneObject]],
) -> None:
    items = [item for objects in hundred for item in objects]
    assert 0.1 < np.mean([item.truncated for item in items]) < 0.6
    assert np.mean([item.difficult for item in items]) < 0.1
    assert all(item.truncated for item in items if item.difficult)


@pytest.mark.slow
def test_truncated_objects_away_from_the_border_are_partly_hidden() -> None:
    hidden = 0
    for index in range(60):
        _, objects = render_scene(8, "train", index)
        _, placed = _compose(8, "train", index, 160)
        for label, thing in zip(objects, placed, strict=True):
            inside = min(label.box[:2]) > 1 and max(label.box[2:]) < 159
            if inside:
                visible = thing.seen.sum() / thing.silhouette.sum()
                assert label.truncated == (visible < 0.85)
                hidden += label.truncated
    assert hidden > 0


def test_every_seed_split_and_index_has_its_own_scene() -> None:
    places = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1), (-1, "train", 0)]
    assert len({render_scene(*place)[0].tobytes() for place in places}) == len(places)
    assert render_scene(*places[0])[0].tobytes() == render_scene(*places[0])[0].tobytes()


def test_size_sets_the_side_of_the_picture() -> None:
    assert render_scene(0, "train", 0, size=224)[0].size == (224, 224)
    with pytest.raises(ValueError, match="at least 64"):
        render_scene(0, "train", 0, size=32)


def test_voc_boxes_count_from_one_and_include_both_ends(tree: Path) -> None:
    for index in range(COUNTS["val"]):
        annotation = ET.parse(tree / "Annotations" / f"val_{index:06d}.xml").getroot()
        read = [
            tuple(int(element.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin"))
            + tuple(int(element.findtext(f"bndbox/{tag}", "")) for tag in ("xmax", "ymax"))
            for element in annotation.findall("object")
        ]
        boxes = [item.box for item in render_scene(3, "val", index)[1]]
        # Half-open x_max counted from 0 is the same number as inclusive xmax counted from 1.
        assert read == [(b[0] + 1, b[1] + 1, b[2], b[3]) for b in boxes]
        assert annotation.findtext("folder") == "VOC2007"
        assert annotation.findtext("filename") == f"val_{index:06d}.jpg"
        size = [annotation.findtext(f"size/{tag}") for tag in ("width", "height", "depth")]
        assert size == ["160", "160", "3"]


def test_the_voc_reader_gives_back_every_label(tree: Path) -> None:
    reader = VocTree(tree)
    assert reader.splits == sorted(COUNTS)
    for split, count in COUNTS.items():
        assert reader.image_ids(split) == [f"{split}_{index:06d}" for index in range(count)]
        for index, key in enumerate(reader.image_ids(split)):
            assert reader.image_path(key).is_file()
            read = [
                SceneObject(
                    b.name,
                    (int(b.x_min), int(b.y_min), int(b.x_max), int(b.y_max)),
                    b.difficult,
                    b.truncated,
                )
                for b in reader.boxes(key)
            ]
            assert read == render_scene(3, split, index)[1]


def test_class_lists_flag_every_image_of_the_split(tree: Path) -> None:
    reader = VocTree(tree)
    for name in CLASSES:
        lines = (tree / "ImageSets" / "Main" / f"{name}_train.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == reader.image_ids("train")
        for line in lines:
            key, flag = line.split()
            difficult = [b.difficult for b in reader.boxes(key) if b.name == name]
            expected = "-1" if not difficult else "0" if all(difficult) else "1"
            assert flag == expected


def test_a_class_with_only_difficult_objects_is_flagged_zero() -> None:
    hard = SceneObject("fish", (0, 0, 9, 9), difficult=True, truncated=True)
    easy = SceneObject("fish", (9, 9, 30, 30), difficult=False, truncated=False)
    assert [_presence("fish", o) for o in ([hard], [hard, easy], [])] == [0, 1, -1]


def test_nothing_temporary_is_left_behind(tree: Path) -> None:
    assert not [name for name in contents(tree) if name.endswith(".tmp")]
