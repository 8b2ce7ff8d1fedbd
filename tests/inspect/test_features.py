"""`dupr inspect features`: colours tell parts of an image apart, the same in every call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dupr_cli.inspect.features import principal_colours
from tests.support.command_line import dupr
from tests.support.images import noise_image
from tests.support.weights import random_weights


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """An image that is red on the left and blue on the right."""
    image = Image.new("RGB", (128, 128), "red")
    image.paste("blue", (64, 0, 128, 128))
    path = tmp_path / "halves.png"
    image.save(path)
    return path


def test_the_halves_of_a_two_coloured_image_have_two_colours(halves: Path, tmp_path: Path) -> None:
    weights, out = random_weights(tmp_path / "w.safetensors"), tmp_path / "f.png"
    done = dupr("inspect", "features", weights, halves, "--size", 128, "--out", out, "--json")
    found = json.loads(done.stdout)
    assert found["shows"] == ["halves.png"]
    assert list(found["explained"]) == ["res2", "res3", "res4", "res5"]
    with Image.open(out) as picture:
        # The panel of res2 follows that of the image; its caption and the heads are outside.
        panel = np.asarray(picture.convert("RGB"), float)[80 + 30 : 80 + 270, 328:628]
    left, right = panel[:, 30:120].reshape(-1, 3), panel[:, 180:270].reshape(-1, 3)
    within = max(float(np.median(np.abs(half - np.median(half, 0)))) for half in (left, right))
    apart = float(np.abs(np.median(left, 0) - np.median(right, 0)).max())
    assert apart > 60
    assert apart > 5 * within


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_cells() -> None:
    cells = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    (colours,), explained = principal_colours([cells])
    (turned,), _ = principal_colours([cells.flip(0, 1)])
    assert (colours[::-1, ::-1] == turned).all()
    assert 0 < explained <= 100


def test_maps_without_differences_are_grey() -> None:
    (colours,), explained = principal_colours([torch.ones(4, 4, 8)])
    assert (colours == 127).all()
    assert explained == 0


def test_random_weights_and_runs_are_shown_too(tiny_run: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    noise_image(0, 64, 48).save(image)
    for weights in (tiny_run, tiny_run / "latest"):
        out = tmp_path / f"{weights.name}-f.png"
        dupr("inspect", "features", weights, image, "--size", 64, "--out", out)
    names = ("tiny-f.png", "latest-f.png")
    of_run, of_checkpoint = (np.asarray(Image.open(tmp_path / name)) for name in names)
    assert (of_run == of_checkpoint).all()


def test_a_file_that_is_no_image_is_one_message(tiny_run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    out = tmp_path / "f.png"
    done = dupr("inspect", "features", tiny_run, text, "--out", out, code=2)
    assert "not an image that can be decoded" in done.stderr
    assert not out.exists()
