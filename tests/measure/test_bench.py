"""`dupr bench` in two staged cases whose bound is known, and what it prints."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import TINY_SET, dupr
from tests.support.example_package import install
from tests.support.images import write_grainy_shards, write_shards
from tests.support.recipes import SMALL_NETWORK
from tests.support.servers import serve

SMALL = ("dupr-r18-cpu-smoke", *TINY_SET, "--set", SMALL_NETWORK, "--device", "cpu")


def bench(data: object, *more: object) -> dict[str, object]:
    result = dupr("bench", *SMALL, "--data", data, "--seconds", 1, "--json", *more)
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_slow_shards_are_the_bound(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 120, per_shard=2)
    with serve(folder, delay=0.2) as served:
        found = bench(served.url, "--workers", 1, "--set", "data.shuffle_shards=60")
    assert found["bound"] == "reading the shards"
    assert float(str(found["waited"])) > 0.3
    assert "most of it goes to reading the shards" in str(found["advice"])


def test_heavy_colour_changes_on_a_small_network_are_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    shards = tmp_path / "shards"
    shards.mkdir()
    write_grainy_shards(shards)
    colours = "method.augmentation"
    keys = (
        "model.backbone=example:small",
        "method.views.size=128",
        "method.patch.weights={}",
        f"{colours}.color_jitter.probability=1",
        f"{colours}.blur.probability=1",
    )
    found = bench(shards, *(argument for key in keys for argument in ("--set", key)))
    assert found["bound"] == "augment"
    assert float(str(found["overhead"])) > 1


def test_parts_rates_and_a_picture(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    picture = tmp_path / "bench.png"
    result = dupr("bench", *SMALL, "--data", shards, "--seconds", 1, "--out", picture)
    for name in ("backbone", "losses", "momentum update", "from memory", "from the shards",
                 "one loader process", "bound by"):  # fmt: skip
        assert name in result.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{shards}", "--out", "bench.txt"), "a PNG is written"),
        (("--data", "nowhere/"), "nowhere"),
        (("--data", "{shards}", "--set", "data.batch_size=32"), "fewer than data.batch_size"),
    ],
)
def test_wrong_usage_is_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    shards = write_shards(tmp_path / "shards", 24)
    given = [argument.format(shards=shards) for argument in arguments]
    code = 1 if "batch_size" in message else 2
    result = dupr("bench", *SMALL, "--seconds", 1, *given, code=code)
    assert message in result.stderr.replace("\n", " ")
