"""Labelled sets: trees and shards alike, upright, with unusable boxes reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import SilentReporter
from tests.support.labelled_scenes import (
    COLOURS,
    add_image,
    add_split,
    annotation_xml,
    make_tree,
    shards_of,
)
from tests.support.reporters import Listening


def test_tree_and_its_shards_are_the_same_set(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    shards = shards_of(tree, tmp_path / "shards")
    for split in ("train", "val"):
        one = open_labelled(str(tree), [split], SilentReporter())
        other = open_labelled(str(shards), [split], SilentReporter())
        assert one.digest == other.digest
        assert one.classes == other.classes == sorted(COLOURS)
        assert np.array_equal(np.asarray(one.image(1)), np.asarray(other.image(1)))


def test_boxes_are_pixel_edges(tmp_path: Path) -> None:
    add_image(tmp_path, "a", [("red", 11, 21, 30, 50)])
    add_split(tmp_path, "train", ["a"])
    images = open_labelled(str(tmp_path), ["train"], SilentReporter())
    assert images.annotations[0].boxes.tolist() == [[10, 20, 30, 50]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_image(tmp_path: Path, orientation: int) -> None:
    add_image(tmp_path, "a", [("red", 11, 21, 30, 50)])
    add_split(tmp_path, "train", ["a"])
    path = tmp_path / "JPEGImages" / "a.png"
    image = Image.open(path)
    exif = image.getexif()
    exif[274] = orientation
    image.save(path, exif=exif)

    images = open_labelled(str(tmp_path), ["train"], SilentReporter())
    pixels = np.asarray(images.image(0))
    rows, columns = np.nonzero((pixels == COLOURS["red"]).all(axis=2))
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    annotation = images.annotations[0]
    assert annotation.boxes.tolist() == [seen]
    assert (annotation.height, annotation.width) == pixels.shape[:2]


def test_several_years_keep_ids_apart_and_in_order(tmp_path: Path) -> None:
    for year in ("VOC2012", "VOC2007"):
        add_image(tmp_path / year, "000001", [("red", 1, 1, 20, 20)])
        add_split(tmp_path / year, "train", ["000001"])
    images = open_labelled(str(tmp_path), ["train"], SilentReporter())
    assert images.ids == ["VOC2007_000001", "VOC2012_000001"]


def test_boxes_without_area_are_dropped_and_reported(tmp_path: Path) -> None:
    add_image(tmp_path, "good", [("red", 1, 1, 20, 20)])
    add_image(tmp_path, "bad", [("red", 1, 1, 20, 20)])
    objects = [("red", 10, 10, 9, 30), ("red", 200, 1, 220, 20), ("blue", 80, 60, 120, 90)]
    (tmp_path / "Annotations" / "bad.xml").write_text(annotation_xml(objects))
    add_split(tmp_path, "train", ["good", "bad"])
    reporter = Listening()
    images = open_labelled(str(tmp_path), ["train"], reporter)
    assert images.annotations[1].boxes.tolist() == [[79, 59, 96, 72]]
    cut, dropped = reporter.warnings
    assert "box cut: 1 in all; the first: bad" in cut
    assert "box dropped: 2 in all; the first: bad" in dropped


def test_an_image_that_is_missing_is_left_out_and_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    (tree / "JPEGImages" / "img003.png").unlink()
    reporter = Listening()
    images = open_labelled(str(tree), ["train"], reporter)
    assert len(images) == 7
    assert "img003" not in images.ids
    assert "1 of 8 images were left out" in reporter.warnings[0]
    assert "img003.jpg: the image is missing" in reporter.warnings[0]
    with Image.open(tree / "JPEGImages" / "img004.png") as following:
        assert np.array_equal(np.asarray(images.image(3)), np.asarray(following))


def test_an_image_whose_annotation_is_missing_is_left_out_and_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    (tree / "Annotations" / "img003.xml").unlink()
    reporter = Listening()
    assert len(open_labelled(str(tree), ["train"], reporter)) == 7
    assert "img003.xml: the annotation is missing" in reporter.warnings[0]


def test_without_a_usable_image_the_first_is_the_error(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    for file in (tree / "Annotations").iterdir():
        file.unlink()
    with pytest.raises(
        UsageError, match=r"no image can be used; the first of 8: .*img000.xml.*missing"
    ):
        open_labelled(str(tree), ["train"], SilentReporter())


def test_an_object_without_a_class_is_left_out_and_named(tmp_path: Path) -> None:
    add_image(tmp_path, "a", [])
    objects = [("", 1, 1, 9, 9), ("red", 1, 1, 9, 9)]
    (tmp_path / "Annotations" / "a.xml").write_text(annotation_xml(objects))
    add_split(tmp_path, "train", ["a"])
    reporter = Listening()
    images = open_labelled(str(tmp_path), ["train"], reporter)
    assert images.annotations[0].names == ("red",)
    assert "an object has no class name" in reporter.warnings[0]


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    path = tree / "JPEGImages" / "img003.png"
    bitmap = path.with_suffix(".bmp")
    with Image.open(path) as image:
        image.save(bitmap)
    path.unlink()
    bitmap.write_bytes(bitmap.read_bytes()[:2000])
    with pytest.raises(RunError, match=r"img003.bmp.*decoded"):
        open_labelled(str(tree), ["train"], SilentReporter()).image(3)


def test_shards_without_boxes_are_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    image = (tree / "JPEGImages" / "img000.png").read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    index = write_shard(shards / "train-000000.tar", [Sample("img000", "png", image)])
    entry = ShardEntry("train-000000.tar", 1, index.bytes, index.sha256)
    Manifest({"train": [entry]}, [], 0, {}, "", {}, "", "").write(shards)
    with pytest.raises(UsageError, match=r"img000 has no boxes"):
        open_labelled(str(shards), ["train"], SilentReporter())


def test_shards_without_splits_are_refused(tmp_path: Path) -> None:
    shards = shards_of(make_tree(tmp_path / "tree"), tmp_path / "shards")
    (shards / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"manifest\.json"):
        open_labelled(str(shards), ["train"], SilentReporter())


@pytest.mark.parametrize(
    ("split", "problem"), [("empty", "lists no images"), ("tset", "no split 'tset'.*train, val")]
)
def test_split_without_images_is_refused(tmp_path: Path, split: str, problem: str) -> None:
    tree = make_tree(tmp_path)
    (tree / "ImageSets" / "Main" / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match=problem):
        open_labelled(str(tree), [split], SilentReporter())


def test_folder_of_images_is_no_labelled_set(tmp_path: Path) -> None:
    make_tree(tmp_path)
    with pytest.raises(UsageError, match="not a labelled set"):
        open_labelled(str(tmp_path / "JPEGImages"), ["train"], SilentReporter())
