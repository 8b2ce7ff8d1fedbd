"""COCO and Cityscapes as labelled sets, and what is said of annotations that are damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dupr_cli.artifacts.pixel_formats import as_picture
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.metrics import Detections, score
from dupr_cli.progress import SilentReporter
from tests.support.labelled_scenes import (
    COLOURS,
    KitObject,
    add_image,
    add_split,
    make_coco,
    make_tree,
)
from tests.support.reporters import Listening

SCENES: list[list[KitObject]] = [
    [("red", 11, 21, 30, 50), ("blue", 61, 1, 96, 40)],
    [],
    [("green", 1, 1, 50, 72)],
]


def opened(root: Path, *splits: str, masks: bool = False) -> LabelledSet:
    return open_labelled(str(root), splits, SilentReporter(), masks=masks)


def coco_tree(root: Path) -> Path:
    return make_coco(root, {"train2017": SCENES, "val2017": SCENES[:1]})


def edit(root: Path, change: Callable[[dict[str, Any]], object], split: str = "train2017") -> None:
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_coco_is_read_as_it_is(tmp_path: Path) -> None:
    images = opened(coco_tree(tmp_path), "train2017")
    assert images.ids == ["train2017_1.png", "train2017_2.png", "train2017_3.png"]
    assert images.classes == sorted(COLOURS)
    assert images.annotations[0].boxes.tolist() == [[10, 20, 30, 50], [60, 0, 96, 40]]
    assert images.annotations[0].names == ("red", "blue")
    assert images.annotations[1].boxes.shape == (0, 4)
    assert as_picture(images.image(0)).getpixel((10, 20)) == COLOURS["red"]


def test_masks_of_coco_are_those_of_pycocotools(tmp_path: Path) -> None:
    images = opened(coco_tree(tmp_path), "train2017", masks=True)
    theirs = COCO(str(tmp_path / "annotations" / "instances_train2017.json"))
    for position, image_id in enumerate([1, 2, 3]):
        expected = [theirs.annToMask(a) for a in theirs.imgToAnns[image_id]]
        masks = images.masks(position)
        assert masks.shape == (len(expected), 72, 96)
        assert all(np.array_equal(mask, one) for mask, one in zip(masks, expected, strict=True))


def test_images_lie_where_users_put_them(tmp_path: Path) -> None:
    for place in ("images/train2017", "images", "."):
        root = coco_tree(tmp_path / place.replace("/", "-").replace(".", "root"))
        target = root / place
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((root / "train2017").iterdir()):
            file.rename(target / file.name)
        assert opened(root, "train2017").image(0).size == (96, 72)


def test_split_names_are_those_of_the_files(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    folder = tmp_path / "annotations"
    (folder / "instances_val2017.json").rename(folder / "mine.json")
    (tmp_path / "val2017").rename(tmp_path / "mine")
    assert len(opened(tmp_path, "mine")) == 1
    with pytest.raises(UsageError, match=r"no file is the split 'test'.*are train2017, mine"):
        opened(tmp_path, "test")


def test_splits_are_joined(tmp_path: Path) -> None:
    """Their image ids are the same, as in files that a tool numbered from 1 each."""
    images = opened(coco_tree(tmp_path), "train2017", "val2017")
    assert len(images) == 4
    assert images.ids[3] == "val2017_1.png"
    assert images.split == "train2017 + val2017"
    with pytest.raises(UsageError, match=r"image train2017_1\.png is in the split 'train'"):
        opened(tmp_path, "train2017", "train")


def test_short_name_of_a_split(tmp_path: Path) -> None:
    assert len(opened(coco_tree(tmp_path), "val")) == 1
    folder = tmp_path / "annotations"
    (folder / "instances_train2017.json").rename(folder / "instances_val2014.json")
    with pytest.raises(UsageError, match=r"several files match .*are val2014, val2017"):
        opened(tmp_path, "val")


def test_crowds_are_crowds_and_areas_those_of_the_file(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    edit(tmp_path, lambda c: c["annotations"][0].update(iscrowd=1, area=123.5))
    images = opened(tmp_path, "train2017")
    truth = images.truth(0, images.classes)
    assert truth.crowd is not None
    assert truth.areas is not None
    assert truth.crowd.tolist() == [True, False]
    assert truth.areas.tolist() == [123.5, 36 * 40]
    assert truth.difficult.tolist() == [False, False]


def test_ground_truth_with_masks_as_detections_scores_100(tmp_path: Path) -> None:
    images = opened(coco_tree(tmp_path), "train2017", masks=True)
    truths = [images.truth(i, images.classes) for i in range(len(images))]
    found = [Detections(t.boxes, t.labels, np.ones(len(t.labels)), t.masks) for t in truths]
    scores = score("coco-segm", truths, found, images.classes).metrics
    assert scores["AP"] == scores["segm_AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["annotations"][0].update(category_id=7), r"annotation 100: its category_id"),
        (lambda c: c["annotations"][0].update(image_id=77), r"annotation 100: its image_id is 77"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 100: its bbox"),
        (lambda c: c["annotations"][0].update(segmentation="abc"), r"its segmentation"),
        (lambda c: c["images"][0].pop("file_name"), r"image number 1: an id and a file_name"),
    ],
)
def test_a_bad_row_of_coco_is_a_warning(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    coco_tree(tmp_path)
    edit(tmp_path, change)
    reporter = Listening()
    images = open_labelled(str(tmp_path), ["train2017"], reporter)
    assert len(images) >= 2
    assert any(re.search(f"train2017.*{problem}", warning) for warning in reporter.warnings)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("images"), r"COCO's JSON, which is an object with images"),
        (lambda c: c.update(images=5), r"not COCO's format: `images` is not a list"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), r"lists no images"),
    ],
)
def test_a_file_that_is_not_coco_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    coco_tree(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UsageError, match=problem) as raised:
        opened(tmp_path, "train2017")
    assert "train2017" in str(raised.value)


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"instances_train2017\.json cannot be read as JSON"):
        opened(tmp_path, "train2017")
    file.write_bytes('{"images": [{"file_name": "Zürich.png"}]}'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"instances_train2017\.json cannot be read as JSON"):
        opened(tmp_path, "train2017")


def test_images_that_are_elsewhere_or_missing_are_named(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    (tmp_path / "train2017" / "train2017_2.png").unlink()
    reporter = Listening()
    assert len(open_labelled(str(tmp_path), ["train2017"], reporter)) == 2
    assert "1 of 3 images were left out" in reporter.warnings[0]
    assert "train2017_2.png: the image is missing" in reporter.warnings[0]
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"train2017_1\.png, is in none of .*train2017"):
        opened(tmp_path, "train2017")


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    other = {"size": [10, 10], "counts": [0, 100]}
    edit(tmp_path, lambda c: c["annotations"][0].update(segmentation=other))
    reporter = Listening()
    open_labelled(str(tmp_path), ["train2017"], reporter)
    assert re.search(
        r"mask left out: 1 .*\[10, 10\] pixels .* but the image has",
        reporter.warnings[0],
    )
    edit(tmp_path, lambda c: c["annotations"][0].pop("segmentation"))
    with pytest.raises(UsageError, match=r"2017_1\.png: an object has no mask.*detector\.model"):
        opened(tmp_path, "train2017", masks=True)
    assert len(opened(tmp_path, "train2017")) == 3


def cityscapes_tree(root: Path, drawn: np.ndarray[Any, Any]) -> Path:
    """One image of one city; drawn: (H, W) instance ids."""
    for part in ("leftImg8bit", "gtFine"):
        (root / part / "train" / "ulm").mkdir(parents=True)
    height, width = drawn.shape
    Image.new("RGB", (width, height)).save(root / "leftImg8bit/train/ulm/ulm_1_2_leftImg8bit.png")
    labels = root / "gtFine/train/ulm/ulm_1_2_gtFine_instanceIds.png"
    Image.fromarray(drawn.astype(np.uint16)).save(labels)
    return root


def test_cityscapes_instances_and_groups(tmp_path: Path) -> None:
    drawn = np.full((40, 60), 7)  # road
    drawn[10:30, 5:15] = 26000  # first car
    drawn[12:20, 8:12] = 26001  # second car, in front of it
    drawn[0:5, 40:60] = 24  # people, not told apart
    images = opened(cityscapes_tree(tmp_path, drawn), "train", masks=True)
    (annotation,) = images.annotations
    assert images.ids == ["ulm_1_2"]
    assert annotation.names == ("person", "car", "car")
    assert annotation.boxes.tolist() == [[40, 0, 60, 5], [5, 10, 15, 30], [8, 12, 12, 20]]
    assert annotation.crowd.tolist() == [True, False, False]
    assert np.array_equal(images.masks(0), [drawn == 24, drawn == 26000, drawn == 26001])


def test_damaged_cityscapes_is_named(tmp_path: Path) -> None:
    root = cityscapes_tree(tmp_path, np.full((40, 60), 26000))
    with pytest.raises(UsageError, match=r"no images of a split 'val'.*splits are train"):
        opened(root, "val")
    labels = root / "gtFine/train/ulm/ulm_1_2_gtFine_instanceIds.png"
    labels.write_bytes(labels.read_bytes()[:40])
    with pytest.raises(UsageError, match=r"instanceIds\.png: the annotation cannot be decoded"):
        opened(root, "train")
    labels.unlink()
    with pytest.raises(UsageError, match=r"instanceIds\.png: the annotation is missing"):
        opened(root, "train")


@pytest.mark.parametrize(
    "content",
    [
        "<annotation><object><name>Zürich</name></object></annotation>".encode("latin-1"),
        b'<?xml version="1.0" encoding="no-such-code"?><annotation/>',
        b'<?xml version="1.0" encoding="gb18030"?><annotation/>',
        b"<annotation><object></annotation>",
        b"",
    ],
)
def test_voc_annotation_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    tree = make_tree(tmp_path)
    (tree / "Annotations" / "img003.xml").write_bytes(content)
    reporter = Listening()
    assert len(open_labelled(str(tree), ["train"], reporter)) == 7
    assert re.search(r"1 of 8 .*img003\.xml: not valid XML.*encoding", reporter.warnings[0])


def test_voc_annotation_in_another_stated_encoding_is_read(tmp_path: Path) -> None:
    add_image(tmp_path, "a", [("red", 1, 1, 9, 9)])
    text = (tmp_path / "Annotations" / "a.xml").read_text().replace("red", "Löwe")
    declared = f'<?xml version="1.0" encoding="ISO-8859-1"?>{text}'
    (tmp_path / "Annotations" / "a.xml").write_bytes(declared.encode("latin-1"))
    add_split(tmp_path, "train", ["a"])
    assert opened(tmp_path, "train").classes == ["Löwe"]


def test_voc_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    (tree / "ImageSets" / "Main" / "train.txt").write_bytes("Zürich\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"train\.txt: the file is not UTF-8 text"):
        opened(tree, "train")
    (tree / "ImageSets" / "Main" / "train.txt").write_bytes(b"\xef\xbb\xbfimg000\n")
    assert opened(tree, "train").ids == ["img000"]


@pytest.mark.parametrize("value", ["nan", "inf", "", "ten"])
def test_voc_corner_that_is_no_number_is_named(tmp_path: Path, value: str) -> None:
    tree = make_tree(tmp_path)
    file = tree / "Annotations" / "img000.xml"
    text = file.read_text()
    start = text.index("<ymax>")
    file.write_text(f"{text[:start]}<ymax>{value}{text[text.index('</ymax>') :]}")
    reporter = Listening()
    images = open_labelled(str(tree), ["train"], reporter)
    assert len(images) == 8
    assert images.annotations[0].names == ()
    problem = r"label left out: 1 in all.*img000\.xml: object '\w+': bndbox/ymax is .* a number"
    assert re.search(problem, reporter.warnings[0])
