"""Names that hold escape sequences, bidirectional marks and line breaks, through the real commands.

Whatever a file, a class or a recipe is called, no output rewrites the terminal or forges a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from dupr_cli.artifacts.results import DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.weights import read_weights
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image
from tests.support.labelled_scenes import make_coco, make_tree
from tests.support.weights import random_weights

HOSTILE = "\x1b[2J\x9b31m\u202egpj\u2066\u200b\x07 <b>|$x_1$"
FORGED = "error: all is lost"
BREAKS = f"x\n{FORGED}\r{FORGED}"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def require_harmless(*texts: str) -> None:
    for text in texts:
        found = {c for c in text if unicodedata.category(c) in HIDDEN} - {"\n"}
        assert not found, (found, text)
        assert not any(line.startswith(FORGED) for line in text.split("\n")), text


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints, on both streams, for people and as JSON; it must be harmless."""
    done = dupr(*arguments, code=code)
    require_harmless(done.stdout, done.stderr)
    return done.stdout + done.stderr


def require_harmless_files(folder: Path) -> None:
    """All texts that are written, also in tars."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".md", ".csv", ".tex", ".yaml"):
            require_harmless(path.read_bytes().decode())
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    require_harmless(member.name.replace("\n", "\r"))
                    if member.name.endswith(".json"):
                        opened = tar.extractfile(member)
                        assert opened is not None
                        require_harmless(opened.read().decode())


def use_shards(shards: Path, tmp_path: Path) -> None:
    run("prepare", "verify", shards, "--workers", 1)
    run("prepare", "stats", shards, "--out", tmp_path / "stats.png")
    run("prepare", "stats", shards, "--json")
    run("prepare", "view", shards, "--out", tmp_path / "view.png")
    require_harmless_files(shards)


NAMES = [os.fsencode(f"{n}-{name}") for n, name in enumerate([HOSTILE, BREAKS, "Größe 東京 😀"])]


@pytest.mark.parametrize("layout", ["folder", "classes"])
def test_names_of_files_and_folders(tmp_path: Path, layout: str) -> None:
    source, shards = tmp_path / "source", tmp_path / "shards"
    for name in [*NAMES, b"not \xff utf-8"]:
        folder = source / "train" / os.fsdecode(name) if layout == "classes" else source
        folder.mkdir(parents=True, exist_ok=True)
        (folder / os.fsdecode(name + b".png")).write_bytes(encode(noise_image(len(name)), "PNG"))
        (folder / os.fsdecode(b"bad-" + name + b".png")).write_bytes(b"no image")
        (folder / os.fsdecode(name + b".xml")).write_bytes(b"<no/>")
    run("prepare", source, shards, "--workers", 1, "--dry-run")
    printed = run("prepare", source, shards, "--workers", 1, "-v")
    assert "warning: 4 of 8 images were left out" in printed
    use_shards(shards, tmp_path)
    lines = (shards / "skipped.jsonl").read_text().splitlines()
    paths = {json.loads(line)["path"].rpartition("/")[2] for line in lines}
    assert f"bad-0-{HOSTILE}.png" in paths  # JSON keeps the true value
    run("prepare", source, shards, "--workers", 1, "--json")
    (source / os.fsdecode(b"new" + NAMES[0] + b".png")).write_bytes(encode(noise_image(9), "PNG"))
    run("prepare", source, shards, "--workers", 1, code=0 if layout == "classes" else 2)


def test_names_of_classes_in_yolo(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "source" / folder).mkdir(parents=True)
    names = json.dumps([HOSTILE, BREAKS])
    (tmp_path / "source/data.yaml").write_text(f"names: {names}\ntrain: images\n")
    for n in range(2):
        (tmp_path / f"source/images/{n}.png").write_bytes(encode(noise_image(n), "PNG"))
        (tmp_path / f"source/labels/{n}.txt").write_text(f"{n} 0.5 0.5 0.2 0.2\n{n} 0.5 0.5 0 0\n")
    run("prepare", tmp_path / "source", tmp_path / "shards", "--workers", 1)
    use_shards(tmp_path / "shards", tmp_path)


def test_names_of_classes_in_voc_and_an_evaluation_of_them(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    for path in (tree / "Annotations").glob("*.xml"):
        text = path.read_text().replace("<name>red", "<name>\u202ere\x9b31md $a_1$ &lt;b&gt;")
        path.write_text(text)
    run("prepare", tree, tmp_path / "shards", "--workers", 1)
    use_shards(tmp_path / "shards", tmp_path)
    call = ["evaluate", "voc", "none", "--data", tree, "--out", tmp_path / "out"]
    call += ["--set", "data.test_splits=[val]"]
    run(*call, "--dry-run", "--set", "data.train_splits=[train]")
    run(*call, "--set", f"data.train_splits={json.dumps([HOSTILE])}", code=2)


def test_names_in_coco_with_halves_of_surrogates(tmp_path: Path) -> None:
    coco = make_coco(tmp_path / "coco", {"train2017": [[("red", 5, 5, 40, 40)]] * 2})
    file = coco / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = f"\ud800{HOSTILE}"
    content["images"][1]["file_name"] = f"\ud800{BREAKS}.png"
    file.write_text(json.dumps(content))
    run("prepare", coco, tmp_path / "shards", "--workers", 1)
    use_shards(tmp_path / "shards", tmp_path)


def test_values_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    key = json.dumps(f"{HOSTILE}{BREAKS}")
    recipe.write_text(f"stage: prepare\nsource: {{kind: {key}}}\n{key}: 1\nseed: {key}\n")
    run("prepare", tmp_path, tmp_path / "out", "-r", recipe, code=2)
    recipe.write_text(f"stage: prepare\ndescription: {key}\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(encode(noise_image(1), "PNG"))
    run("prepare", tmp_path / "images", tmp_path / "out", "-r", recipe, "--dry-run")
    run("prepare", tmp_path / "images", tmp_path / "out", "-r", recipe, "--dry-run", "--json")


def test_an_error_with_its_traceback(tmp_path: Path) -> None:
    source = str(tmp_path / f"{HOSTILE}{BREAKS}".replace("/", ""))
    command = [sys.executable, "-m", "dupr_cli", "prepare", source, str(tmp_path), "--traceback"]
    done = subprocess.run(command, capture_output=True)
    assert b"Traceback" in done.stderr
    require_harmless(done.stderr.decode())


def evaluation(folder: Path, sha256: str) -> Path:
    """Results as a stranger may have written them."""
    text = f"{HOSTILE}{BREAKS}\n---\n# Heading\n"
    data = DatasetIdentity(text, text, 1, 1, "0")
    results = [
        WeightsResult(text, digest, text, {"AP": 1.0}, {text: {"AP": 1.0}}, {"train": 1.0})
        for digest in (sha256, "0")
    ]
    folder.mkdir()
    Results(
        protocol=text, metric=text, train=data, test=data, classes=[text], results=results,
        recipe={"data": {"test_images": None}}, recipe_sha256="", seeds=[0], dupr_version=text,
        changes={text: [text, text]}, notes=[text, f"# {text}"],
    ).write(folder)  # fmt: skip
    return folder


def test_a_model_card_of_an_evaluation_by_others(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    found = evaluation(tmp_path / "eval", read_weights(str(weights)).sha256)
    tags = json.dumps([HOSTILE])
    run(
        "export", weights, "--out", tmp_path / "out", "--push-to-hub", "me/model", "--local-only",
        "--results", found, "--set", f"card.tags={tags}", "--to", "torchvision",
    )  # fmt: skip
    require_harmless_files(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "\n# Heading" not in card
    assert "<b>" not in card.partition("\n---\n")[2]
    assert metadata_load(tmp_path / "out/README.md")["model-index"]  # type: ignore[index]
    cells = [line.count("|") - line.count("\\|") for line in card.split("\n") if line[:1] == "|"]
    assert set(cells) == {3}


def test_a_report_of_evaluations_by_others(tmp_path: Path) -> None:
    found = evaluation(tmp_path / "eval", "1")
    run("evaluate", "report", found, "--out", tmp_path / "out")
    require_harmless_files(tmp_path / "out")
