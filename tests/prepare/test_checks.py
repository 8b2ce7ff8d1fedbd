"""dupr prepare verify, stats, view: what they find in shards, whole and damaged."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image, write_shards


def labelled_shards(folder: Path) -> Path:
    folder.mkdir()
    samples = [
        Sample(
            f"s{n}", "png", encode(noise_image(n, 40 + n, 30), "PNG"), "", 40 + n, 30,
            boxes=(Box("cat", 2, 3, 12, 13), Box("dog", 0, 0, 39, 30, difficult=True)),
        )
        for n in range(6)
    ]  # fmt: skip
    index = write_shard(folder / "train-000000.tar", samples)
    entry = ShardEntry("train-000000.tar", len(index), index.bytes, index.sha256)
    Manifest({"train": [entry]}, ["cat", "dog"], 0, {}, "t", {}, "t", "0").write(folder)
    (folder / "skipped.jsonl").write_text("")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = write_shards(tmp_path / "shards", 30, 10)
    (folder / "skipped.jsonl").write_text("")
    return folder


def test_a_whole_set_is_whole(shards: Path) -> None:
    found = json.loads(dupr("prepare", "verify", shards, "--json").stdout)
    assert found == {"shards": 3, "samples": 30, "problems": []}
    # And one without a manifest, as others write them.
    (shards / "manifest.json").unlink()
    assert "whole" in dupr("prepare", "verify", shards).stdout


def flip_in_image(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 0xFF
    tar.write_bytes(data)


def truncate(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])


def lose(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def lose_index(folder: Path) -> None:
    (folder / "train-000001.index.json").unlink()


def swap_index(folder: Path) -> None:
    shutil.copy(folder / "train-000000.index.json", folder / "train-000001.index.json")


def stranger(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000007.tar")


def lose_lines(folder: Path) -> None:
    (folder / "skipped.jsonl").write_text('{"path": "x", "reason": "y"}\n')


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (flip_in_image, ["train-000001.tar: its sha256 is not that of the manifest"]),
        (truncate, ["train-000001.tar: it has 5000 bytes", "sample s0013"]),
        (lose, ["train-000001.tar: it is missing"]),
        (lose_index, ["train-000001.tar: its index is missing"]),
        (swap_index, ["train-000001.tar: its index belongs to another shard"]),
        (stranger, ["train-000007.tar: the manifest does not list it"]),
        (lose_lines, ["skipped.jsonl: 1 lines, 0 by the manifest"]),
    ],
)
def test_every_damage_is_named(
    shards: Path, damage: Callable[[Path], None], messages: list[str]
) -> None:
    damage(shards)
    found = dupr("prepare", "verify", shards, code=1)
    for message in messages:
        assert message in found.stdout, found.stdout


def test_samples_that_do_not_decode_or_lie_are_named_by_shard_and_key(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    whole = encode(noise_image(0, 200, 150))
    samples = [
        Sample("good", "jpg", whole, "", 200, 150),
        Sample("cut", "jpg", whole[:1500], "", 200, 150),
        Sample("lies", "jpg", whole, "", 100, 150),
    ]  # fmt: skip
    write_shard(folder / "a-000000.tar", samples)
    write_shard(folder / "a-000001.tar", samples[:1])
    text = dupr("prepare", "verify", folder, code=1).stdout
    assert "a-000000.tar: sample cut: does not decode" in text
    assert "a-000000.tar: sample lies: it has 200 x 150 pixels, 100 x 150 by its JSON" in text
    assert "a-000001.tar: sample good: another sample has the same key" in text


def test_stats_count_and_measure(tmp_path: Path) -> None:
    folder = labelled_shards(tmp_path / "s")
    found = json.loads(
        dupr("prepare", "stats", folder, "--json", "--out", tmp_path / "stats.png").stdout
    )
    assert (found["images"], found["shards"], found["unreadable"]) == (6, 1, 0)
    assert found["widths"] == [40, 41.25, 42.5, 43.75, 45]
    assert found["heights"] == [30] * 5
    assert found["objects"] == {"cat": 6, "dog": 6}
    assert found["object_sizes"] == {"small": 6, "medium": 6, "large": 0}
    assert sum(found["aspect"]["counts"]) == sum(found["side"]["counts"]) == 6
    assert sum(found["object_side"]["counts"]) == 12
    pixels = np.concatenate(
        [np.asarray(noise_image(n, 40 + n, 30)).reshape(-1, 3) for n in range(6)]
    )
    assert found["mean"] == pytest.approx((pixels.mean(0) / 255).tolist())
    assert found["std"] == pytest.approx((pixels.std(0) / 255).tolist())
    assert Image.open(tmp_path / "stats.png").width > 500
    assert "small" in dupr("prepare", "stats", folder).stdout


def test_a_contact_sheet_shows_images_with_their_boxes(tmp_path: Path) -> None:
    folder = labelled_shards(tmp_path / "s")
    out = tmp_path / "sheet.png"
    found = json.loads(dupr("prepare", "view", folder, "--out", out, "--count", 4, "--json").stdout)
    assert len(found["keys"]) == 4
    assert found["keys"] == sorted(found["keys"])
    sheet = np.asarray(Image.open(out).convert("RGB"))
    with tarfile.open(folder / "train-000000.tar") as tar:
        stored = tar.extractfile(f"{found['keys'][0]}.png")
        assert stored is not None
        first = Image.open(stored).convert("RGB")
    # The first cell holds the first image, scaled to 200 pixels.
    scale = 200 / first.width
    height = round(first.height * scale)
    top = 6 + (200 - height) // 2
    cell = sheet[top : top + height, 6:206].astype(float)
    plain = np.asarray(first.resize((200, height)), dtype=float)
    difference = np.abs(cell - plain).max(axis=2)
    # Pixels differ on the frames of the boxes and the names, and there alone.
    left, edge = round(2 * scale), round(3 * scale)
    assert difference[edge : round(13 * scale), left].min() > 20
    assert (difference > 60).mean() < 0.25
