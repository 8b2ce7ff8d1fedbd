"""Order and content of batches: pure functions of seed, epoch and number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import RunError
from dupr_cli.pretrain.data import BatchOrder, epoch_order, held_out, training_batches
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.runtime.parallel import World
from tests.support.images import encode, noise_image

Load = Callable[..., PretrainRecipe]
ALONE = World(torch.device("cpu"))


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda c: sum(c) > 0),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    window=st.integers(1, 20),
)
def test_an_epoch_holds_every_sample_once(
    counts: list[int], seed: int, epoch: int, window: int
) -> None:
    order = epoch_order(counts, seed, epoch, window)
    assert sorted(order) == list(range(sum(counts)))


def test_reads_stay_within_a_window_of_shards() -> None:
    order = epoch_order([10] * 8, seed=1, epoch=0, window=2)
    for first in range(0, 80, 20):
        assert len({number // 10 for number in order[first : first + 20]}) == 2


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(epoch_order([50], s, e, 4)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3


@given(total=st.integers(1, 5000), wanted=st.integers(0, 600))
def test_held_out_images_are_at_most_a_tenth(total: int, wanted: int) -> None:
    numbers = held_out(total, wanted)
    assert len(set(numbers)) == len(numbers) == min(wanted, total // 10)
    assert np.array_equal(numbers, held_out(total, wanted))


def test_stream_of_batches_repeats_nothing_within_an_epoch_and_trains_on_no_held_out_image(
    tiny_shards: Path, tiny_recipe: Load
) -> None:
    shards = open_shards(str(tiny_shards))
    order = BatchOrder(shards, tiny_recipe())
    batches = list(islice(order, 30))
    assert all(len(batch) == 8 for batch in batches)
    seen = [request for batch in batches for request in batch]
    assert Counter(seen).most_common(1)[0][1] == 1
    assert not {number for _, number in seen} & set(held_out(90, 8).tolist())
    first_epoch = [number for epoch, number in seen if epoch == 0]
    assert len(first_epoch) == order.images == 82


@given(step=st.integers(0, 40))
def test_order_can_be_entered_at_any_step(tiny_shards: Path, step: int) -> None:
    from dupr_cli.recipe import load_recipe
    from tests.support.recipes import TINY

    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", list(TINY))
    shards = open_shards(str(tiny_shards))
    whole = list(islice(BatchOrder(shards, recipe), 45))
    entered = BatchOrder(shards, recipe)
    entered.first_step = step
    assert list(islice(entered, 5)) == whole[step : step + 5]


def test_batches_do_not_depend_on_the_number_of_workers(
    tiny_shards: Path, tiny_recipe: Load
) -> None:
    shards = open_shards(str(tiny_shards))
    found = []
    for workers in (0, 1, 3):
        loader, _ = training_batches(shards, tiny_recipe(f"data.workers={workers}"), 2, ALONE)
        found.append(list(islice(loader, 3)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.views, b.views)
            assert torch.equal(a.crops, b.crops)
            assert torch.equal(a.parameters, b.parameters)


def shards_with(tmp_path: Path, images: list[bytes]) -> str:
    tar = tmp_path / "train-000000.tar"
    write_shard(tar, [Sample(f"k{i}", "jpg", data) for i, data in enumerate(images)])
    return str(tar)


def test_undecodable_images_are_replaced_and_counted(tmp_path: Path, tiny_recipe: Load) -> None:
    good = [encode(noise_image(i)) for i in range(20)]
    images = [data[:200] if i % 5 == 0 else data for i, data in enumerate(good)]
    shards = open_shards(shards_with(tmp_path, images))
    loader, order = training_batches(shards, tiny_recipe("data.holdout=0"), 0, ALONE)
    batches = list(islice(loader, 5))  # two epochs of 20
    assert order.images == 20
    assert sum(batch.unreadable for batch in batches) == 8


def test_too_many_undecodable_images_end_with_the_key(tmp_path: Path, tiny_recipe: Load) -> None:
    shards = open_shards(shards_with(tmp_path, [b"no image"] * 40))
    loader, _ = training_batches(shards, tiny_recipe("data.holdout=0"), 0, ALONE)
    with pytest.raises(RunError, match=r"20 images in a row .* the first is k\d+"):
        next(iter(loader))


def test_fewer_images_than_a_batch_is_said(tmp_path: Path, tiny_recipe: Load) -> None:
    shards = open_shards(shards_with(tmp_path, [encode(noise_image(0))] * 5))
    with pytest.raises(RunError, match=r"5 images to train on .* fewer than data.batch_size = 8"):
        BatchOrder(shards, tiny_recipe())


def test_a_damaged_json_is_replaced_and_counted_like_a_damaged_image(
    tmp_path: Path, tiny_recipe: Load
) -> None:
    """Pre-training needs nothing that the JSON says."""
    address = shards_with(tmp_path, [encode(noise_image(i)) for i in range(20)])
    places = open_shards(address).index(0).infos
    with Path(address).open("r+b") as tar:
        for place in (places[0], places[3]):
            assert place is not None
            tar.seek(place[0])
            tar.write(b"?")
    shards = open_shards(address)
    loader, _ = training_batches(shards, tiny_recipe("data.holdout=0"), 0, ALONE)
    assert sum(batch.unreadable for batch in islice(loader, 5)) == 4  # two epochs of 20
