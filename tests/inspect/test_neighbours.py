"""`dupr inspect neighbours`: a copy of an image has the nearest patch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.command_line import dupr
from tests.support.images import noise_image


def neighbours(run: Path, images: Path, out: Path, *more: object) -> dict[str, Any]:
    shown = dupr("inspect", "neighbours", run, images, "--out", out, "--json", *more).stdout
    found: dict[str, Any] = json.loads(shown)
    return found


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Six images, each there twice, in two folders."""
    folder = tmp_path / "images"
    (folder / "copies").mkdir(parents=True)
    for number in range(6):
        noise_image(number, 64, 64).save(folder / f"{number}.png")
        shutil.copyfile(folder / f"{number}.png", folder / "copies" / f"{number}.png")
    return folder


def test_the_nearest_patch_is_that_of_a_copy(tiny_run: Path, twins: Path, tmp_path: Path) -> None:
    found = neighbours(tiny_run, twins, tmp_path / "n.png", "--level", "res4", "--queries", 12)
    assert found["images"] == 12
    assert len(found["queries"]) == 12
    for query in found["queries"]:
        first = query["nearest"][0]
        assert first["similarity"] == pytest.approx(1, abs=1e-5)
        assert Path(first["image"]).name == Path(query["image"]).name
        assert first["image"] != query["image"]
        similarities = [each["similarity"] for each in query["nearest"]]
        assert similarities == sorted(similarities, reverse=True)
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.format == "PNG"


def test_shards_are_searched_up_to_the_limit(
    tiny_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    more = ("--limit", 20, "--queries", 2, "--count", 3)
    found = neighbours(tiny_run, tiny_shards, tmp_path / "n.png", *more)
    assert found["level"] == "res5"
    assert found["images"] == 20
    assert [len(query["nearest"]) for query in found["queries"]] == [3, 3]


def test_wrong_use_is_one_message_with_exit_code_2(
    tiny_run: Path, twins: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ("--out", tmp_path / "n.png")
    for words, message in (
        ((tmp_path / "nowhere",), "does not exist"),
        ((empty,), "contains no images"),
        ((twins, "--level", "res9"), "there is no such level"),
        ((twins, "--level", "res2"), "patches are compared at res4, res5"),
    ):
        done = dupr("inspect", "neighbours", tiny_run, *words, *out, code=2)
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
    assert not (tmp_path / "n.png").exists()
