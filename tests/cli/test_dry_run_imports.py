"""No dry run loads torchvision, whose import, with torch's compiler, takes longer than torch's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.class_images import class_folders
from tests.support.command_line import TINY_SET
from tests.support.labelled_scenes import make_tree
from tests.support.weights import random_weights

CASES = ("prepare", "pretrain", "voc", "frozen", "knn", "export", "recipe list")

RUN_AND_LIST_MODULES = """
import sys
from dupr_cli.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sys.modules, file=sys.stderr)
"""


def command(name: str, root: Path, shards: Path) -> list[object]:
    weights, out = root / "w.safetensors", root / "out"
    if name in ("voc", "frozen", "export"):
        random_weights(weights)
    if name in ("voc", "frozen"):
        frozen = ["--frozen"] if name == "frozen" else []
        tree = make_tree(root / "tree")
        return ["evaluate", "voc", weights, "none", *frozen, "--data", tree, "--out", out]
    if name == "knn":
        classes = class_folders(root / "classes", 4, 2)
        return ["evaluate", "knn", "none", "--data", classes, "--out", out]
    calls: dict[str, list[object]] = {
        "prepare": ["prepare", shards, out],
        "pretrain": ["pretrain", "dupr-r18-cpu-smoke", "--data", shards, "--out", out, *TINY_SET],
        "export": ["export", weights, "--to", "torchvision", "--to", "timm", "--out", out],
        "recipe list": ["recipe", "list"],
    }
    return calls[name]


@pytest.mark.parametrize("name", CASES)
def test_dry_run_loads_neither_torchvision_nor_the_compiler(
    name: str, tmp_path: Path, tiny_shards: Path
) -> None:
    call = [str(part) for part in command(name, tmp_path, tiny_shards)]
    dry = [] if name == "recipe list" else ["--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *call, *dry],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    loaded = set(done.stderr.rpartition("loaded: ")[2].split())
    unwanted = {"torchvision", "torch._dynamo"}
    if name in ("prepare", "recipe list"):
        unwanted.add("torch")
    assert not loaded & unwanted
