"""The Python of the documentation runs: the plug-ins as another package's, the calls as calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.labelled_scenes import make_tree
from tests.support.named_inputs import photographs, smallest
from tests.support.recipes import SMALL_DETECTOR

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def install_plugins(site: Path) -> None:
    """Every plug-in of the page as a module, under the entry point that the page gives."""
    facts = site / "plugins-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    for toml, code in zip(*(blocks("plugins.md", of) for of in ("toml", "python")), strict=True):
        ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
        ((name, place),) = points.items()
        with (facts / "entry_points.txt").open("a") as file:
            file.write(f"[{group}]\n{name} = {place}\n")
        module = site / (place.partition(":")[0].replace(".", "/") + ".py")
        module.parent.mkdir(exist_ok=True)
        if module.stem == "example_backbone":  # the page leaves the network of the detector out
            whole = (ROOT / "tests" / "example_backbone" / "example_backbone.py").read_text()
            code = whole.partition("class ExampleBackbone")[0] + code
        module.write_text(code)


@pytest.mark.slow
def test_every_plugin_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    install_plugins(tmp_path / "site")

    def dupr(*words: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "dupr_cli", *map(str, words), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    slide = tmp_path / "slides" / "a"
    photographs(slide)
    (slide / "tiles.txt").write_text(" ".join(path.stem for path in sorted(slide.glob("*.png"))))
    made = dupr("prepare", "slides/", "shards/", "--set", "source.kind=microscope")
    assert made["samples"] == {"train": 40}
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["classes"] == ["cell"]

    keys = [word for key in smallest("dupr") for word in ("--set", key)]
    dupr(
        "pretrain", "dupr-r18-cpu-smoke", "--data", "shards/", "--out", "runs/a", *keys,
        "--set", "model.backbone=example:small", "--set", "method.name=harder",
        "--set", "method.options={centre: 3}", "--track", "diary:PROJECT", "--steps", 4,
    )  # fmt: skip
    told = [json.loads(line) for line in (tmp_path / "PROJECT.jsonl").read_text().splitlines()]
    assert {line["run"] for line in told} == {"a"}
    assert max(line["step"] for line in told) == 4

    dupr("export", "runs/a", "--to", "arrays", "--out", "arrays")
    with np.load(tmp_path / "arrays" / "weights.npz") as arrays:
        assert arrays["stem.weight"].shape == (8, 3, 2, 2)


@pytest.mark.slow
def test_the_calls_of_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    (call,) = blocks("architecture.md", "python")
    exec(compile(call, "architecture.md", "exec"), {})
    assert (tmp_path / "shards" / "manifest.json").is_file()

    small = "".join(
        f"{section}: {{{', '.join(of)}}}\n"
        for section in ("data", "train", "test", "detector")
        if (of := [key.partition(".")[2].replace("=", ": ") for key in SMALL_DETECTOR
                   if key.startswith(section)])
    )  # fmt: skip
    (tmp_path / "small.yaml").write_text(f"stage: evaluate\nextends: voc-frozen-tiny\n{small}")
    (function,) = blocks("python.md", "python")
    steps = '{"train.steps": 500, "data.workers": 2}'
    assert steps in function
    few = [*smallest("dupr"), "train.steps=4"]
    names: dict[str, Any] = {}
    shorter = function.replace(steps, repr(few)).replace('"voc-frozen-tiny"', '"small.yaml"')
    exec(compile(shorter, "python.md", "exec"), names)
    gain = names["improve"](tmp_path / "photos", make_tree(tmp_path / "tree"), tmp_path / "out")
    assert -100 <= gain <= 100
    assert (tmp_path / "out" / "backbone.safetensors").is_file()
