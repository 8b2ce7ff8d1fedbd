"""`dupr inspect`: pictures of sensible size that show what they were asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry, open_shards
from dupr_cli.cli.app import app
from dupr_cli.inspect.curves import curves_figure, draw_curves, run_names
from dupr_cli.inspect.views import draw_views
from dupr_cli.pretrain.data import held_out
from dupr_cli.recipe import PretrainRecipe
from tests.support.images import encode, noise_image
from tests.support.recipes import TINY

TINY_SET = [argument for override in TINY for argument in ("--set", override)]


def dupr(*arguments: object, code: int = 0) -> Result:
    done = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


def views(shards: Path, out: Path, *more: object, code: int = 0) -> Result:
    arguments = ("dupr-r18-cpu-smoke", "--data", shards, "--out", out, *TINY_SET, *more)
    return dupr("inspect", "views", *arguments, code=code)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(path: Path, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((pixels(path) == wanted).all(-1).any())


def test_views_are_drawn_one_row_for_each_image(tiny_shards: Path, tmp_path: Path) -> None:
    heights = {}
    for count in (1, 3):
        out = tmp_path / "new" / f"{count}.png"
        shown = json.loads(views(tiny_shards, out, "--count", count, "--json").stdout)
        assert shown["path"] == str(out)
        assert len(set(shown["shows"])) == count
        heights[count], width, _ = pixels(out).shape
        assert 800 < width < 1200
    assert 600 < heights[3] - heights[1] < 800


def test_views_show_held_out_images_then_the_first(tiny_shards: Path, tmp_path: Path) -> None:
    shards = open_shards(str(tiny_shards))
    held = [shards[int(number)].key for number in held_out(len(shards), 8)]
    shown = json.loads(views(tiny_shards, tmp_path / "v.png", "--count", 10, "--json").stdout)
    assert shown["shows"][:8] == held
    others = [shards[i].key for i in range(10) if shards[i].key not in held]
    assert shown["shows"][8:] == others[:2]


def test_views_differ_by_seed_and_not_by_call(tiny_shards: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        views(tiny_shards, tmp_path / f"{name}.png", "--count", 1, "--seed", seed)
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_views_of_a_recipe_without_a_patch_loss(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.png"
    views(tiny_shards, out, "--count", 1, "--set", "method.patch={weights: {}, bins: {}}")
    assert len(np.unique(pixels(out))) > 100


def test_views_leave_out_a_damaged_image(
    tmp_path: Path, tiny_recipe: Callable[..., PretrainRecipe]
) -> None:
    data = {"bad": b"no picture", "good": encode(noise_image(0)), "cut": encode(noise_image(1))}
    data["cut"] = data["cut"][:200]
    samples = [Sample(key, "jpg", image, f"{key}.jpg", 48, 40) for key, image in data.items()]
    index = write_shard(tmp_path / "train-000000.tar", samples)
    entry = ShardEntry("train-000000.tar", len(index), index.bytes, index.sha256)
    Manifest({"train": [entry]}, [], 0, {}, "test", {}, "test", "0").write(tmp_path)
    assert draw_views(tmp_path / "v.png", tiny_recipe(), str(tmp_path), 3) == ["good"]


def write_run(run: Path, queue: int = 64, steps: int = 100, reference: bool = True) -> Path:
    """A run directory with the metrics of a run that learns."""
    run.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step in range(0, steps + 1, 10):
        if step % 50 == 0:
            lines.append({"step": step, "retrieval/res4": step / 200, "retrieval_pool/res4": 128})
        if step:
            line: dict[str, float] = {"step": step, "images_per_second": 100 + step}
            for place in ("image/res4", "image/res5", "patch/res4"):
                line |= {f"loss/{place}": 5 - step / 50, f"spread/{place}": 0.9}
                if reference:
                    line[f"reference/{place}"] = math.log(1 + queue)
            lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 1')  # a crash cut the last line short
    return run


BLUE, ORANGE = "#1f77b4", "#ff7f0e"


def test_curves_of_two_runs_lie_over_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", queue=512, steps=60)]
    out = tmp_path / "new" / "curves.png"
    shown = json.loads(dupr("inspect", "curves", *runs, "--out", out, "--json").stdout)
    assert shown == {"path": str(out), "shows": [str(run) for run in runs]}
    height, width, _ = pixels(out).shape
    assert 1000 < width < 2500
    assert 400 < height < 1500
    assert has_colour(out, BLUE)
    assert has_colour(out, ORANGE)


def test_curves_of_one_run_as_a_python_call(tmp_path: Path) -> None:
    draw_curves(write_run(tmp_path / "run"), tmp_path / "curves.png")
    assert has_colour(tmp_path / "curves.png", BLUE)
    assert not has_colour(tmp_path / "curves.png", ORANGE)


def reference_lines(runs: list[Path], title: str) -> list[float]:
    (axes,) = (axes for axes in curves_figure(runs).axes if axes.get_title() == title)
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    return [float(np.asarray(line.get_ydata())[0]) for line in dashed]


def test_a_loss_panel_has_the_reference_of_every_queue_length(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, queue=64) for name in "ab"]
    assert reference_lines(runs, "patch loss, res4") == [math.log(65)]
    runs.append(write_run(tmp_path / "c", queue=512))
    assert reference_lines(runs, "patch loss, res4") == [math.log(65), math.log(513)]
    old = write_run(tmp_path / "d", reference=False)
    assert reference_lines([old], "patch loss, res4") == []


def test_curves_have_a_panel_for_every_measure_with_its_unit(tmp_path: Path) -> None:
    axes = curves_figure([write_run(tmp_path / "run")]).axes
    assert {(each.get_title(), each.get_ylabel()) for each in axes} == {
        ("held-out patch retrieval, res4", "top-1 of 128 patches (%)"),
        ("spread of embeddings, lowest level", "1 is healthy, 0 collapsed"),
        ("speed", "images per second"),
        ("image loss, res4", "loss (nats, not weighted)"),
        ("image loss, res5", "loss (nats, not weighted)"),
        ("patch loss, res4", "loss (nats, not weighted)"),
    }
    assert all(each.get_xlabel() == "step" for each in axes)
    retrieval = np.asarray(axes[0].get_lines()[0].get_ydata())
    assert retrieval.tolist() == [0, 25, 50]


def test_curves_of_many_runs_and_of_a_run_at_its_start(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-with-a-long-name-{n:02d}") for n in range(12)]
    runs.append(write_run(tmp_path / "start", steps=0))
    draw_curves(runs, tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").shape[1] < 2500


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    assert run_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert run_names([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]
    assert run_names([Path("x/run"), Path("x/run/")]) == ["run", "run"]


def test_wrong_use_is_one_message_with_exit_code_2(tiny_shards: Path, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "new" / "p.png"
    for arguments, message in (
        (("curves", tmp_path / "nowhere", "--out", out), "metrics.jsonl is missing or empty"),
        (("curves", run, tiny_shards, "--out", out), "metrics.jsonl is missing or empty"),
        (("curves", run, "--out", run / "metrics.jsonl"), "give a name that ends in .png"),
        (("views", "no-recipe", "--data", tiny_shards, "--out", out), "nor a shipped recipe"),
        (
            ("views", "dupr-r18-cpu-smoke", "--data", tmp_path / "x", "--out", out),
            "the shard does not exist",
        ),
    ):
        done = dupr("inspect", *arguments, code=2)
        assert message in done.stderr
        assert done.stderr.count("error:") == 1
    assert not out.parent.exists()
    dupr("inspect", "curves", run, code=2)
    views(tiny_shards, out, "--count", 0, code=2)


COMMANDS = ("views", "curves", "matches", "neighbours", "features", "weights")


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)])
def test_help_has_examples(words: tuple[str, ...]) -> None:
    text = dupr("inspect", *words, "--help").stdout
    assert "Usage:" in text
    assert not words or f"dupr inspect {words[0]}" in text
