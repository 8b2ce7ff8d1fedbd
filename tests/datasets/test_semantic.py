"""Sets with semantic masks: VOC, Cityscapes, plain folders, turned images, and damaged masks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dupr_cli.datasets.placement import Placement, placed_mask
from dupr_cli.datasets.semantic import CITYSCAPES_IDS, SemanticSet, open_semantic
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import SilentReporter
from tests.support.mask_sets import (
    Mask,
    cityscapes,
    drawn,
    plain_folder,
    save_palette,
    scene,
    scenes,
    voc_year,
)
from tests.support.reporters import Listening

_ORIENTATION = 0x0112


def opened(root: Path, *splits: str) -> SemanticSet:
    return open_semantic(str(root), splits, SilentReporter())


def test_voc_masks_are_read_by_number_and_void_is_not_background(tmp_path: Path) -> None:
    made = scenes(train=3, val=2)
    found = opened(voc_year(tmp_path / "VOC2012", made), "val")
    assert len(found.classes) == 21
    assert found.classes[:3] == ["background", "aeroplane", "bicycle"]
    for position, mask in enumerate(made["val"]):
        assert np.array_equal(found.mask(position), mask)
    assert found.annotations[0].names == ("background", "aeroplane", "bicycle")
    assert found.annotations[0].areas.sum() == (made["val"][0] != 255).sum()


def test_train_aug_takes_its_own_masks(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    made = scenes(train=2, train_aug=3)
    voc_year(root, {"train": made["train"]})
    voc_year(root, {"train_aug": made["train_aug"]}, augmented=True)
    found = opened(tmp_path / "VOCdevkit", "train_aug")
    assert [np.array_equal(found.mask(i), m) for i, m in enumerate(made["train_aug"])] == [True] * 3
    assert len(opened(tmp_path, "2012/train")) == 2
    lists = root / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2012_train_aug1.jpg /SegmentationClassAug/2012_train_aug1.png\n"
    )
    assert np.array_equal(opened(root, "trainaug").mask(0), made["train_aug"][1])


def test_cityscapes_ids_become_the_19_classes(tmp_path: Path) -> None:
    ids = np.arange(48, dtype=np.uint8).reshape(6, 8)
    ids[ids > 33] = 255  # a licence plate, or nothing
    found = opened(cityscapes(tmp_path, {"val": [ids]}), "val")
    mask = found.mask(0)
    assert len(found.classes) == 19
    for number, name in enumerate(found.classes):
        assert (ids[mask == number] == CITYSCAPES_IDS[name]).all()
    assert (mask != 255).sum() == 19


@pytest.mark.parametrize("nested", [False, True])
def test_plain_folder_in_both_layouts(nested: bool, tmp_path: Path) -> None:
    made = scenes(train=2, val=2)
    root = plain_folder(tmp_path / "set", made)
    if nested:
        for split in made:
            (root / split).mkdir()
            for part in ("images", "masks"):
                (root / part / split).rename(root / split / part)
        for part in ("images", "masks"):
            (root / part).rmdir()
    found = opened(root, "val")
    assert found.classes == ["background", "red", "green"]
    assert found.ids == ["val0", "val1"]
    assert np.array_equal(found.mask(1), made["val"][1])


def test_folder_without_splits_or_names(tmp_path: Path) -> None:
    root = plain_folder(tmp_path, scenes(train=3), names=(), save=save_palette)
    for part in ("images", "masks"):
        for file in (root / part / "train").iterdir():
            file.rename(root / part / file.name)
        (root / part / "train").rmdir()
    assert opened(root, "train").classes == ["class 0", "class 1", "class 2"]
    with pytest.raises(UsageError, match=r"no split 'val'; its splits are train.*data.validation"):
        opened(root, "val")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("upright", [False, True])
def test_mask_is_turned_with_its_image(orientation: int, upright: bool, tmp_path: Path) -> None:
    """The oracle is Pillow's own turn of the same pixels."""
    stored = scene(3)
    root = plain_folder(tmp_path, {"train": [stored]})
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    drawn(stored).save(root / "images" / "train" / "train0.png", exif=exif)
    turned = Image.fromarray(stored)
    turned.getexif()[_ORIENTATION] = orientation
    expected = np.array(ImageOps.exif_transpose(turned))
    if upright and orientation >= 5:
        Image.fromarray(expected).save(root / "masks" / "train" / "train0.png")
    reporter = Listening()
    found = open_semantic(str(root), ["train"], reporter)
    assert np.array_equal(found.mask(0), expected)
    in_doubt = any("orientation in doubt" in warning for warning in reporter.warnings)
    assert in_doubt == (orientation in (2, 3, 4))
    shown = np.array(found.image(0))
    colours = np.array(drawn(expected))
    assert np.array_equal(shown, colours)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_scaled_masks_hold_no_value_between_two_classes(width: int, height: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice([0, 20, 255], (13, 17)).astype(np.uint8)
    scaled = Placement(1, 17, 13, width, height).values(mask)
    assert scaled.shape == (height, width)
    assert set(np.unique(scaled)) <= set(np.unique(mask))
    # Pillow's nearest neighbour reads the same pixels, except on ties of its own arithmetic.
    image = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    assert (scaled == np.array(image)).mean() > 0.9


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(RunError, match="8 x 6 pixels, but the image has 10 x 6"):
        placed_mask(np.zeros((6, 8), dtype=np.uint8), (10, 6), 1)


def rgb(path: Path) -> None:
    Image.new("RGB", (96, 72)).save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((72, 96), dtype=np.uint16)).save(path)


def beyond(path: Path) -> None:
    Image.fromarray(np.full((72, 96), 3, dtype=np.uint8)).save(path)


def small(path: Path) -> None:
    Image.fromarray(np.zeros((36, 48), dtype=np.uint8)).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (rgb, r"has colours \(RGB\) per pixel, but class numbers are needed. Save it as a PNG"),
        (deep, "more than 8 bits per pixel, but class numbers are needed"),
        (beyond, "has the value 3, but there are 3 classes, 0 to 2"),
        (small, "its mask has 48 x 36 pixels, but the image has 96 x 72; give the mask"),
        (cut, "the mask cannot be decoded"),
        (Path.unlink, "the mask is missing"),
    ],
)
def test_damaged_mask_is_left_out_and_named(damage: object, expected: str, tmp_path: Path) -> None:
    root = plain_folder(tmp_path, scenes(train=3))
    assert callable(damage)
    damage(root / "masks" / "train" / "train1.png")
    reporter = Listening()
    found = open_semantic(str(root), ["train"], reporter)
    assert found.ids == ["train0", "train2"]
    (warning,) = reporter.warnings
    assert "1 of 3 images were left out; the first" in warning
    assert f"{root}/masks/train/train1.png: " in warning
    assert re.search(expected, warning)
    for number in (0, 2):
        damage(root / "masks" / "train" / f"train{number}.png")
    with pytest.raises(UsageError, match=f"no image can be used; the first of 3: .*{expected}"):
        opened(root, "train")


def test_files_without_an_image_are_reported(tmp_path: Path) -> None:
    root = plain_folder(tmp_path, scenes(train=2))
    (root / "masks" / "train" / "train1.png").rename(root / "masks" / "train" / "train1.bmp")
    reporter = Listening()
    open_semantic(str(root), ["train"], reporter)
    assert any("1 files belong to no image, or are not PNG" in said for said in reporter.warnings)


def test_what_is_no_set_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a set with semantic masks\. Give a VOC tree"):
        opened(tmp_path, "train")
    with pytest.raises(UsageError, match="the folder does not exist"):
        opened(tmp_path / "nothing", "train")
    root = plain_folder(tmp_path / "set", scenes(train=2), names=("a", "a"))
    with pytest.raises(UsageError, match=r"classes.txt: 2 names, of which 1 differ"):
        opened(root, "train")
    (root / "images" / "val").mkdir()
    with pytest.raises(UsageError, match=r"masks/val: the folder of masks"):
        opened(root, "val")
    voc = voc_year(tmp_path / "voc", scenes(train=1))
    with pytest.raises(UsageError, match=r"no split 'test' of masks; .* has train"):
        opened(voc, "test")


def test_masks_decide_the_digest(tmp_path: Path) -> None:
    first: Mask = scene(0)
    root = plain_folder(tmp_path, {"train": [first]})
    before = opened(root, "train").digest
    changed = first.copy()
    changed[40, 40] = (changed[40, 40] + 1) % 3
    Image.fromarray(changed).save(root / "masks" / "train" / "train0.png")
    assert opened(root, "train").digest != before
