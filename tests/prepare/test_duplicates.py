"""Duplicates over the whole set, whatever the blocks: the first stays, the others are named."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dupr_cli import prepare
from dupr_cli.artifacts.hashes import perceptual_hash
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.prepare import duplicates
from dupr_cli.prepare.duplicates import RECORD, equal_rows, similar_rows
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.images import encode, noise_image, write_shards


def records_of(values: list[tuple[int, int, int, int]], block: int) -> duplicates.Records:
    def read() -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        for start in range(0, len(values), block):
            yield start, np.array(values[start : start + block], RECORD)

    return read


few = st.integers(0, 3)


@settings(max_examples=60)
@given(st.lists(st.tuples(few, few, few, few), max_size=30), st.integers(1, 8), st.integers(1, 20))
def test_equal_records_point_at_the_first(
    values: list[tuple[int, int, int, int]], block: int, at_once: int
) -> None:
    names = ("low", "high")
    seen: dict[tuple[int, int], int] = {}
    expected = [
        [position, seen[value[1:3]]]
        for position, value in enumerate(values)
        if seen.setdefault(value[1:3], position) != position
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(duplicates, "_AT_ONCE", at_once)  # several passes
        found = equal_rows(records_of(values, block), len(values), names)
    assert found.tolist() == expected


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from([0, 0xFFFF_FFFF_FFFF_FFFF, 0xF0F0_F0F0_0F0F_0F0F]),
                       st.sets(st.integers(0, 63), max_size=5)), max_size=14),
    st.integers(0, 6),
)  # fmt: skip
def test_similar_records_are_those_of_a_plain_search(
    looks: list[tuple[int, set[int]]], distance: int
) -> None:
    hashes = [base ^ sum(1 << bit for bit in bits) for base, bits in looks]
    kept: list[int] = []
    expected = []
    for position, value in enumerate(hashes):
        if any((value ^ hashes[k]).bit_count() <= distance for k in kept):
            expected.append(position)
        else:
            kept.append(position)
    values = [(n, n, n, value) for n, value in enumerate(hashes)]
    found = similar_rows(records_of(values, 4), np.empty(0, np.int64), distance)
    assert sorted(found[:, 0].tolist()) == expected
    for new, old in found.tolist():
        assert old in kept
        assert (hashes[new] ^ hashes[old]).bit_count() <= distance


def test_the_perceptual_hash_is_imagehashs() -> None:
    import imagehash

    for seed in range(20):
        image = noise_image(seed, 90 + seed, 70)
        theirs = int(str(imagehash.phash(image)), 16)
        assert (perceptual_hash(image) ^ theirs).bit_count() <= 1  # a tie with the median


@pytest.mark.parametrize("block", [1, 4, 100])
def test_duplicates_are_left_out_over_all_blocks_and_splits(tmp_path: Path, block: int) -> None:
    source = tmp_path / "source"
    for split in ("train", "val"):
        (source / split / "class").mkdir(parents=True)
    for number in range(6):
        data = encode(noise_image(number), "PNG")
        (source / "train/class" / f"{number}.png").write_bytes(data)
        if number % 2:
            (source / "train/class" / f"again{number}.png").write_bytes(data)
    (source / "val/class" / "v0.png").write_bytes(encode(noise_image(0), "PNG"))
    (source / "val/class" / "v9.png").write_bytes(encode(noise_image(9), "PNG"))
    recipe = load_recipe(PrepareRecipe, None, [f"shard.max_samples={block}"])
    result = prepare.run(recipe, source, tmp_path / "out", workers=1)
    assert result.samples == {"train": 6, "val": 1}
    assert result.skip_reasons == {"duplicate of": 4}
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").open()]
    # In the order of names, digits come before letters: the numbered ones are first.
    assert [Path(line["path"]).stem for line in lines] == ["again1", "again3", "again5", "v0"]
    assert [line["reason"][:14] for line in lines] == [f"duplicate of: {n}"[:14] for n in "1350"]
    keep = load_recipe(PrepareRecipe, None, ["filter.duplicates=keep"])
    assert prepare.run(keep, source, tmp_path / "all", workers=1).skipped == 0


def test_pictures_that_look_the_same_are_left_out_on_request(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        image = noise_image(number, 160, 120)
        image.save(source / f"{number}.png")
        image.resize((120, 90)).save(source / f"{number}small.jpg", quality=70)
    exact = load_recipe(PrepareRecipe, None, ["shard.max_samples=3"])
    assert prepare.run(exact, source, tmp_path / "exact", workers=1).skipped == 0
    near = load_recipe(PrepareRecipe, None, ["shard.max_samples=3", "filter.duplicates=near"])
    result = prepare.run(near, source, tmp_path / "near", workers=1)
    assert result.skip_reasons == {"looks like": 5}
    shards = open_shards(str(tmp_path / "near"))
    assert sorted(shards[i].source for i in range(5)) == [f"{n}.png" for n in range(5)]
    many = prepare.run(near, source, tmp_path / "two", workers=2)
    assert many.samples == result.samples
    files = [p.name for p in (tmp_path / "near").iterdir()]
    assert all(
        (tmp_path / "near" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_labelled_images_are_not_taken_for_duplicates(tmp_path: Path) -> None:
    source = tmp_path / "yolo"
    for part in ("images", "labels"):
        (source / part).mkdir(parents=True)
    for name in "ab":
        noise_image(0).save(source / "images" / f"{name}.png")
        (source / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    recipe = load_recipe(PrepareRecipe, None)
    assert prepare.run(recipe, source, tmp_path / "out", workers=1).samples == {"train": 2}
    # Our own shards know whether they are labelled.
    assert prepare.run(recipe, tmp_path / "out", tmp_path / "a", workers=1).skipped == 0
    asked = load_recipe(PrepareRecipe, None, ["filter.duplicates=exact"])
    assert prepare.run(asked, tmp_path / "out", tmp_path / "b", workers=1).skipped == 1


def test_what_is_rewritten_is_otherwise_the_same(tmp_path: Path) -> None:
    """A shard that loses a sample is what it would be, had the sample never been there."""
    source = tmp_path / "source"
    source.mkdir()
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
        noise_image(seed).save(source / f"{name}.png")
    recipe = load_recipe(PrepareRecipe, None)
    prepare.run(recipe, source, tmp_path / "with", workers=1)
    (source / "c.png").unlink()
    prepare.run(recipe, source, tmp_path / "without", workers=1)
    for name in ("train-000000.tar", "train-000000.index.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_rewriting_keeps_labels_and_members(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", 10)
    image = open_shards(str(shards))[0]
    assert image.label is None
    stored = Image.open(io.BytesIO(image.image))
    assert stored.size == (48, 40)
