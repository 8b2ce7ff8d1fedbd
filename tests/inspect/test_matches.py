"""`dupr inspect matches`: the heat map is brightest where the patch really lies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dupr_cli.inspect.matches import _frame, bin_box, cut_pairs, similarity_map
from dupr_cli.inspect.network import open_network
from dupr_cli.inspect.sheet import SIDE
from tests.support.command_line import dupr, pretrain
from tests.support.images import noise_image
from tests.support.weights import random_weights

# Views that are the whole image, twice: neither cropped, nor mirrored, nor recoloured.
IDENTITY = (
    "method.views.scale=[1, 1]",
    "method.views.ratio=[1, 1]",
    "method.augmentation.flip_probability=0",
    "method.augmentation.grayscale_probability=0",
    "method.augmentation.blur.probability=0",
    "method.augmentation.color_jitter.probability=0",
    "method.views.size=64",
    "method.patch.bins.res4=4",
    "method.patch.bins.res5=2",
    "train.steps=2",
)


@pytest.fixture(scope="module")
def identity_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "identity"
    pretrain(tiny_shards, run, *(word for key in IDENTITY for word in ("--set", key)))
    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        noise_image(number, 80, 80).save(path)
    return paths


def matches(run: Path, images: list[Path], out: Path, *more: object) -> dict[str, Any]:
    shown = dupr("inspect", "matches", run, *images, "--out", out, "--json", *more).stdout
    found: dict[str, Any] = json.loads(shown)
    return found


def test_a_patch_is_found_in_a_view_that_is_the_same(
    identity_run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    found = matches(identity_run, pictures, tmp_path / "m.png", "--count", 3)
    assert found["found"] == {"res4": 100.0, "res5": 100.0}
    assert {patch["level"] for patch in found["patches"]} == {"res4", "res5"}
    for patch in found["patches"]:
        assert patch["rank"] == 1
        assert patch["found"]
        assert patch["similarity"] == pytest.approx(1, abs=1e-5)
        assert patch["peak"] == pytest.approx(1, abs=1e-5)


def test_the_heat_map_is_brightest_at_the_true_place_and_moves_with_the_patch(
    identity_run: Path, pictures: list[Path]
) -> None:
    network = open_network(identity_run, "cpu")
    image = Image.open(pictures[0]).convert("RGB")
    pairs = cut_pairs(network, [("a", image)], [], seed=0)
    seen = set()
    for patch in range(16):
        x0, y0, x1, y1 = bin_box(pairs.boxes[0, 1], bool(pairs.flips[0, 1]), 4, patch)
        query = pairs.first["res4"][0, patch]
        values = similarity_map(network, pairs.views[0, 1], "res4", query, x1 - x0)
        row, column = np.unravel_index(values.argmax(), values.shape)
        seen.add((row, column))
        assert x0 <= (column + 0.5) * 64 / len(values) <= x1
        assert y0 <= (row + 0.5) * 64 / len(values) <= y1
    assert len(seen) == 16


def test_bins_of_a_mirrored_view_count_from_the_right() -> None:
    box = torch.tensor([10.0, 20.0, 50.0, 60.0])
    assert bin_box(box, False, 4, 5) == (20, 30, 30, 40)
    assert bin_box(box, True, 4, 5) == (30, 30, 40, 40)


def test_chosen_patches_are_shown_in_fractions_and_in_pixels(
    identity_run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    places = ("--patch", "0.25,0.75", "--patch", "30,50")
    found = matches(identity_run, pictures[:1], tmp_path / "m.png", *places)
    given = {(p["x"], p["y"]) for p in found["patches"] if p["chosen"] == "given"}
    assert given == {(20.0, 60.0), (30.0, 50.0)}
    assert all(patch["other"] is None for patch in found["patches"])


def test_the_picture_is_the_same_for_the_same_seed(
    tiny_run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        matches(tiny_run, pictures, tmp_path / f"{name}-out.png", "--seed", seed)
    a, b, c = ((tmp_path / f"{name}-out.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_checkpoint_shows_what_its_run_shows(
    tiny_run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    of_run = matches(tiny_run, pictures, tmp_path / "m.png")
    of_checkpoint = matches(tiny_run / "latest", pictures, tmp_path / "n.png")
    assert of_run["patches"] == of_checkpoint["patches"]
    assert of_run["note"] == "embeddings of the patch heads"


def test_a_run_from_before_cell_centres_is_pooled_as_it_was_trained(
    tiny_run: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_run, old, symlinks=True)
    recipe = (old / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(re.sub(r" *cell_centres: .*\n", "", recipe))
    grids = []
    for run in (tiny_run, old):
        heads = open_network(run, "cpu").heads
        assert heads is not None
        grids.append(heads.grids["res5"].first)
    assert grids[1] == 16
    assert grids[0] != 16


def test_weights_without_heads_say_that_features_are_compared(
    pictures: list[Path], tmp_path: Path
) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    found = matches(weights, pictures[:1], tmp_path / "m.png")
    assert "without heads: backbone features" in found["note"]


def test_wrong_use_is_one_message_with_exit_code_2(
    tiny_run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    out = ("--out", tmp_path / "new.png")
    for words, message in (
        ((tiny_run, tmp_path / "none.jpg", *out), "the image does not exist"),
        ((tiny_run, text, *out), "not an image that can be decoded"),
        ((tmp_path / "nowhere", pictures[0], *out), "does not exist"),
        ((tiny_run, pictures[0], "--patch", "here", *out), "--patch here: give X,Y"),
        ((tiny_run, pictures[0], "--patch", "900,20", *out), "outside of an image of 80 x 80"),
        ((tiny_run, pictures[0], "--out", pictures[0]), "is one of the images"),
        ((tiny_run, pictures[0], "--out", tmp_path / "m.jpg"), "ends in .png"),
    ):
        done = dupr("inspect", "matches", *words, code=2)
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
    assert not (tmp_path / "new.png").exists()


def test_the_frame_of_a_patch_at_the_edge_is_whole() -> None:
    panel = Image.new("RGB", (SIDE, SIDE), "gray")
    _frame(panel, (0, 32, 16, 64), SIDE / 64, "white")
    middle = 3 * SIDE // 4
    for place in ((1, middle), (SIDE // 4, middle), (SIDE // 8, SIDE // 2), (SIDE // 8, SIDE - 2)):
        assert panel.getpixel(place) == (255, 255, 255), place
