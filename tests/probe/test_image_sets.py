"""What is probed: the same images from every layout, and messages for what is none."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dupr_cli.artifacts.pixel_formats import as_picture
from dupr_cli.errors import RunError, UsageError
from dupr_cli.probe.data import (
    ImageSet,
    check_classes,
    divide,
    open_classified,
    open_pictured,
    open_train_and_test,
)
from dupr_cli.probe.image_readers import square_around
from dupr_cli.progress import SilentReporter
from tests.support.class_images import HUES, class_folders, class_shards, picture
from tests.support.images import encode, noise_image, write_shards
from tests.support.labelled_scenes import make_tree, shards_of
from tests.support.reporters import Listening

SILENT = SilentReporter()


def foreign_tar(path: Path, classes: list[str | None], first: int = 0) -> Path:
    """A tar that dupr did not write: <key>.png and <key>.cls."""
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(classes):
            members = {"png": encode(picture("jade", first + number), "PNG")}
            if label is not None:
                members["cls"] = f"{label}\n".encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{first + number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_folders_and_shards_are_the_same_images(tmp_path: Path) -> None:
    folders = class_folders(tmp_path / "tree", 4, 2)
    shards = class_shards(tmp_path / "shards", 4, 2)
    for split in ("train", "val"):
        one = open_classified(str(folders), split, 8, SILENT)
        other = open_classified(str(shards), split, 8, SILENT)
        assert one.labels == other.labels
        assert one.classes == sorted(HUES)
        for position in (0, len(one) - 1):
            ours, theirs = one.image(position), other.image(position)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_foreign_shards_have_their_classes_in_cls(tmp_path: Path) -> None:
    tar = foreign_tar(tmp_path / "a.tar", ["3", "17", "3"])
    images = open_classified(str(tar), None, 8, SILENT)
    assert images.labels == ("3", "17", "3")
    assert images.image(0).size == (56, 48)


def test_objects_are_images_where_only_boxes_are_known(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", train=6)
    shards = shards_of(tree, tmp_path / "shards")
    one = open_classified(str(tree), "train", 8, SILENT)
    other = open_classified(str(shards), "train", 8, SILENT)
    assert one.ids == other.ids
    assert len(one) == 9  # every other image has two objects
    colours = {"red": 0, "green": 1, "blue": 2}
    for position, label in enumerate(one.labels):
        image = as_picture(one.image(position))
        centre = image.getpixel((image.width // 2, image.height // 2))
        assert isinstance(centre, tuple)
        assert max(range(3), key=lambda c: centre[c]) == colours[label]


@given(
    width=st.integers(20, 400),
    height=st.integers(20, 400),
    places=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_square_lies_in_the_image_and_holds_the_box(
    width: int, height: int, places: tuple[float, float, float, float]
) -> None:
    x0, x1 = sorted((places[0] * (width - 2), places[1] * (width - 2)))
    y0, y1 = sorted((places[2] * (height - 2), places[3] * (height - 2)))
    x1, y1 = x1 + 2, y1 + 2
    left, top, right, bottom = square_around((x0, y0, x1, y1), width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    # To the rounding of a pixel; it is a square unless the image is too narrow for one.
    assert left <= x0 + 1
    assert right >= x1 - 1
    assert top <= y0 + 1
    assert bottom >= y1 - 1
    side = round(max(x1 - x0, y1 - y0))
    assert (right - left, bottom - top) == (min(side, width), min(side, height))


def test_images_are_upright(tmp_path: Path) -> None:
    for name in HUES:
        (tmp_path / "train" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[274] = 6
        picture(name, 0).save(tmp_path / "train" / name / "a.jpg", exif=exif)
    images = open_classified(str(tmp_path), "train", 8, SILENT)
    assert images.image(0).size == (48, 56)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", 2, 1)
    (tree / "train" / "jade" / "00.png").write_bytes(b"nothing")
    images = open_classified(str(tree), "train", 8, SILENT)
    with pytest.raises(RunError, match=r"jade/00\.png: the image cannot be decoded"):
        images.image(images.labels.index("jade"))


def whole(folder: Path, count: int) -> ImageSet:
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        place = folder / ("one", "two")[number % 2] / f"{number}.png"
        noise_image(number, 20, 20).save(place)
    return open_classified(str(folder), None, 8, SILENT)


def test_hashed_split_is_stable_and_divides(tmp_path: Path) -> None:
    images = whole(tmp_path / "a", 200)
    train, test = divide(images, 0.25)
    assert sorted([*train.ids, *test.ids]) == sorted(images.ids)
    assert 30 <= len(test) <= 70
    # Fewer images, another order: each stays on its side.
    _, some = divide(images.subset(range(150, 20, -1)), 0.25)
    assert set(some.ids) == set(test.ids) & {images.ids[i] for i in range(150, 20, -1)}


def test_objects_of_one_image_stay_on_one_side(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", train=40)
    train, test = divide(open_classified(str(tree), "train", 8, SILENT), 0.4)
    sides = [{image_id.partition("#")[0] for image_id in s.ids} for s in (train, test)]
    assert not sides[0] & sides[1]


def test_limit_draws_the_same_images_again(tmp_path: Path) -> None:
    images = whole(tmp_path / "a", 30)
    drawn = images.drawn(10, 5, 0)
    assert len(drawn) == 10
    assert drawn.ids == images.drawn(10, 5, 0).ids
    assert images.drawn(20, 5, 0).ids[:10] == drawn.ids
    assert drawn.ids != images.drawn(10, 6, 0).ids
    assert images.drawn(None, 5, 0) is images
    assert images.drawn(30, 5, 0) is images


def test_digest_tells_labels_and_images_apart(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", 2, 1)
    before = open_classified(str(tree), "train", 8, SILENT).digest
    assert open_classified(str(tree), "train", 8, SILENT).digest == before
    noise_image(1).save(tree / "train" / "jade" / "00.png")
    assert open_classified(str(tree), "train", 8, SILENT).digest != before


def opened(
    data: Path,
    fraction: float | None = None,
    train_split: str = "train",
    test_split: str = "val",
    test_data: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    return open_train_and_test(str(data), test_data, train_split, test_split, fraction, 8, SILENT)


def test_what_cannot_be_probed_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this folder or shard does not exist"):
        opened(tmp_path / "nowhere")
    tree = class_folders(tmp_path / "tree", 2, 1)
    with pytest.raises(UsageError, match=r"no split 'valid'; it has train, val"):
        opened(tree, test_split="valid")
    with pytest.raises(UsageError, match=r"no test split.*--test-data.*data\.test_fraction"):
        opened(tree / "train")
    with pytest.raises(UsageError, match=r"sample s0000 has no class"):
        opened(write_shards(tmp_path / "plain", 20), test_split="train")
    flat = tmp_path / "flat"
    flat.mkdir()
    noise_image(0).save(flat / "a.png")
    with pytest.raises(UsageError, match=r"no labels were found\. Give class folders"):
        opened(flat)
    shards = class_shards(tmp_path / "shards", 2, 1)
    with pytest.raises(UsageError, match=r"no split 'test'; its splits are train, val"):
        opened(shards, test_split="test")
    voc = make_tree(tmp_path / "voc")
    with pytest.raises(UsageError, match=r"no split 'test'; ImageSets/Main of voc has train, val"):
        opened(voc, test_split="test")
    with pytest.raises(UsageError, match="no object of 99 pixels"):
        open_classified(str(voc), "train", 99, SILENT)
    tar = foreign_tar(tmp_path / "b.tar", ["3", None])
    with pytest.raises(UsageError, match="sample 0001 has no class"):
        opened(tar)
    with pytest.raises(UsageError, match="do not divide"):
        opened(tree / "val", fraction=0.001)


def test_another_set_can_be_tested_on(tmp_path: Path) -> None:
    train = foreign_tar(tmp_path / "train.tar", ["3", "17", "3"])
    test = foreign_tar(tmp_path / "val.tar", ["17", "3"], first=50)
    one, other = opened(train, test_data=str(test))
    assert (one.labels, other.labels) == (("3", "17", "3"), ("17", "3"))


def test_classes_are_checked(tmp_path: Path) -> None:
    tree = class_folders(tmp_path / "tree", 2, 1)
    train, test = opened(tree)
    only_jade = train.subset([i for i, name in enumerate(train.labels) if name == "jade"])
    with pytest.raises(UsageError, match="only the class 'jade'"):
        check_classes(only_jade, test, SILENT)
    reporter = Listening()
    without = train.subset([i for i, name in enumerate(train.labels) if name != "jade"])
    assert check_classes(without, test, reporter) == sorted(HUES)
    assert any("jade: only test images have these classes" in line for line in reporter.said)
    reporter = Listening()
    check_classes(train, train, reporter)
    assert any("trained on" in line for line in reporter.said)


def test_any_images_serve_where_no_labels_are_needed(tmp_path: Path) -> None:
    shards = open_pictured(str(write_shards(tmp_path / "plain", 20)), None, SILENT)
    assert (len(shards), shards.labels, shards.boxed) == (20, (), None)
    tree = make_tree(tmp_path / "voc")
    boxed = open_pictured(str(tree), "val", SILENT)
    assert boxed.boxed is not None
    third = boxed.subset([2]).boxed
    assert third is not None
    assert third.ids == [boxed.ids[2]]
    labelled = open_pictured(str(shards_of(tree, tmp_path / "shards")), "val", SILENT)
    assert labelled.digest == boxed.digest
    with pytest.raises(UsageError, match=r"choose a split. It has train, val"):
        open_pictured(str(tree), None, SILENT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="the folder contains no images"):
        open_pictured(str(tmp_path / "empty"), None, SILENT)
