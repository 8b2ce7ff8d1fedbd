"""Semantic masks in shards: placed with the image, kept exactly, read back by the evaluation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.shard_files import MASK, Sample, write_shard
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.datasets.semantic import SemanticSet, open_semantic
from dupr_cli.errors import UsageError
from dupr_cli.progress import SilentReporter
from tests.support.images import write_shards
from tests.support.mask_sets import cityscapes, drawn, plain_folder, scene, scenes, voc_year

_ORIENTATION = 0x0112


def opened(root: Path, split: str) -> SemanticSet:
    return open_semantic(str(root), [split], SilentReporter())


def prepared(source: Path, out: Path, *overrides: str) -> Path:
    prepare.run("default", str(source), out, overrides=overrides, workers=1)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder, one of whose images is turned by its EXIF orientation."""
    made = scenes(train=3, val=2)
    root = plain_folder(tmp_path_factory.mktemp("set") / "set", made)
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    drawn(made["train"][1]).save(root / "images" / "train" / "train1.png", exif=exif)
    return root


def test_set_from_shards_is_the_set_itself(root: Path, tmp_path: Path) -> None:
    shards = prepared(root, tmp_path / "shards")
    for split in ("train", "val"):
        ours, theirs = opened(root, split), opened(shards, split)
        assert theirs.ids == ours.ids
        assert theirs.classes == ["background", "red", "green"]
        for position in range(len(ours)):
            assert np.array_equal(theirs.mask(position), ours.mask(position))
            assert np.array_equal(np.array(theirs.image(position)), np.array(ours.image(position)))
    assert opened(shards, "val").digest == opened(root, "val").digest


def test_mask_is_scaled_with_its_image_and_never_mixed(root: Path, tmp_path: Path) -> None:
    shards = prepared(root, tmp_path / "shards", "image.max_side=40")
    found = opened(shards, "train")
    for position in range(3):
        image, mask = np.array(found.image(position)), found.mask(position)
        assert max(mask.shape) == 40
        assert mask.shape == image.shape[:2]
        assert set(np.unique(mask)) <= {0, 1, 2, 255}
        near = np.abs(image.astype(int) - np.array(drawn(mask)).astype(int)).max(2) < 60
        assert near.mean() > 0.85  # all but the edges of objects


def test_shards_made_again_keep_and_scale_masks(root: Path, tmp_path: Path) -> None:
    first = prepared(root, tmp_path / "first")
    again = prepared(first, tmp_path / "again")
    once, twice = opened(first, "train"), opened(again, "train")
    assert all(np.array_equal(once.mask(i), twice.mask(i)) for i in range(3))
    small = opened(prepared(first, tmp_path / "small", "image.max_side=48"), "train")
    assert small.mask(0).shape == (36, 48)


def test_member_of_another_tool_stays_as_it_is(tmp_path: Path) -> None:
    """It has the name of a mask, but nothing says that it is one."""
    image, other = io.BytesIO(), io.BytesIO()
    drawn(scene(0)).save(image, "PNG")
    Image.new("RGB", (10, 10)).save(other, "PNG")
    sample = Sample("a", "png", image.getvalue(), extras={MASK: other.getvalue()})
    (tmp_path / "made").mkdir()
    write_shard(tmp_path / "made" / "train-000000.tar", [sample])
    shards = prepared(tmp_path / "made", tmp_path / "shards", "image.max_side=48")
    kept = open_shards(str(shards), "train").whole(0)
    assert kept.width == 48
    assert kept.extras == {MASK: other.getvalue()}


def test_voc_by_the_name_of_the_kind_and_cityscapes_by_itself(tmp_path: Path) -> None:
    made = scenes(train=2, val=1)
    voc = prepared(voc_year(tmp_path / "voc", made), tmp_path / "a", "source.kind=masks")
    assert len(opened(voc, "train").classes) == 21
    assert np.array_equal(opened(voc, "val").mask(0), made["val"][0])
    ids = {split: [np.full((40, 60), 26, dtype=np.uint8)] for split in ("train", "val")}
    city = opened(prepared(cityscapes(tmp_path / "city", ids), tmp_path / "b"), "val")
    assert city.annotations[0].names == ("car",)


def test_image_with_a_damaged_mask_is_skipped_and_named(tmp_path: Path) -> None:
    source = plain_folder(tmp_path / "set", scenes(train=3))
    masks = source / "masks" / "train"
    (masks / "train0.png").unlink()
    Image.new("L", (10, 10)).save(masks / "train2.png")
    prepared(source, tmp_path / "shards")
    said = (tmp_path / "shards" / "skipped.jsonl").read_text()
    assert "train0.png: the mask is missing" in said
    assert "its mask has 10 x 10 pixels, but the image has 96 x 72" in said
    assert opened(tmp_path / "shards", "train").ids == ["train1"]


def test_shards_without_masks_say_what_to_do(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 4)
    with pytest.raises(UsageError, match=r"has no mask.*--set source.kind=masks"):
        opened(shards, "train")
