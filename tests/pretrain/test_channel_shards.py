"""Shards that keep channels, as pre-training opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import RunError
from dupr_cli.pretrain.data import ViewPairs
from dupr_cli.recipe.pretrain import AugmentationSection, MethodSection, ViewsSection
from tests.support.channel_images import blobs, npy
from tests.support.images import encode, noise_image

FORMAT = PixelFormat(5, (0.0, 4095.0))
METHOD = MethodSection(
    views=ViewsSection(size=32), augmentation=AugmentationSection(mean=(0.5,) * 5, std=(1,) * 5)
)


def kept(number: int, pixels: PixelFormat = FORMAT) -> Sample:
    data = npy(blobs(number, pixels.channels))
    return Sample(f"s{number}", "npy", data, "", 48, 40, pixels=pixels, depth=16)


def test_views_are_floats_of_all_channels_and_the_same_every_time(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [kept(0), kept(1)])
    pairs = ViewPairs(open_shards(str(tmp_path / "a.tar")), METHOD, seed=0)
    one, again = pairs((0, 1)), pairs((0, 1))
    assert one.views.shape == (2, 5, 32, 32)
    assert np.array_equal(one.views, again.views)
    assert 0 <= float(one.views.min()) < float(one.views.max()) <= 1
    assert not one.unreadable


@pytest.mark.parametrize(
    "other",
    [
        kept(7, PixelFormat(5, (0.0, 999.0))),
        kept(7, PixelFormat(4, (0.0, 4095.0))),
        Sample("s7", "png", encode(noise_image(0), "PNG"), "", 48, 40),
    ],
)
def test_shards_of_two_formats_are_not_mixed(tmp_path: Path, other: Sample) -> None:
    """They would be scaled in silence as the first are, or fail in a batch without a name."""
    write_shard(tmp_path / "a.tar", [kept(0), kept(1)])
    write_shard(tmp_path / "b.tar", [other])
    shards = open_shards(str(tmp_path))
    assert shards.pixels == FORMAT
    with pytest.raises(RunError, match=r"sample s7 is one of .* Give shards of one format"):
        ViewPairs(shards, METHOD, seed=0)((0, 2))


def test_a_damaged_image_is_replaced_and_counted(tmp_path: Path) -> None:
    broken = Sample("s1", "npy", kept(1).image[:-50], "", 48, 40, pixels=FORMAT, depth=16)
    write_shard(tmp_path / "a.tar", [kept(0), broken, kept(2)])
    pairs = ViewPairs(open_shards(str(tmp_path / "a.tar")), METHOD, seed=0)
    assert pairs((0, 1)).unreadable == 1


def test_other_fields_of_that_name_stay_with_the_sample(tmp_path: Path) -> None:
    """Another tool's JSON may use the name `pixels` for something else."""
    sample = Sample("s0", "png", encode(noise_image(0), "PNG"), info={"pixels": 1920})
    write_shard(tmp_path / "a.tar", [sample])
    shards = open_shards(str(tmp_path / "a.tar"))
    assert shards.pixels is None
    assert shards[0].info == {"pixels": 1920}
