"""How long the command line takes before it does anything, beside programs that do nothing.

Help is compared with that of a typer program of one command, and dry runs with importing torch.

`make bench` prints the times; docs/benchmarks.md says what was seen. No test asserts one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.support.class_images import class_folders
from tests.support.command_line import TINY_SET
from tests.support.labelled_scenes import make_tree
from tests.support.weights import random_weights

ROUNDS = 11
BARE = """
import typer
app = typer.Typer()
@app.callback()
def root() -> None:
    "A program."
@app.command()
def greet(name: str) -> None:
    "Say hello."
app()
"""


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def medians(forms: dict[str, list[str]], folder: Path) -> dict[str, float]:
    # Installed programs have their bytecode, so each form runs once before it is timed.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for arguments in forms.values():
        seconds(arguments, environment)
    rounds = [
        {name: seconds(arguments, environment) for name, arguments in forms.items()}
        for _ in range(ROUNDS)
    ]
    return {name: statistics.median(row[name] for row in rounds) for name in forms}


def dupr(*arguments: object) -> list[str]:
    return ["-m", "dupr_cli", *map(str, arguments)]


def show(times: dict[str, float], own: str) -> None:
    print(f"\nmedians of {ROUNDS}, and times {own}")
    for name, median in times.items():
        print(f"  {name:28}{median:7.3f} s  {median / times[own]:5.2f}")


def test_help_beside_a_bare_typer_program(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text(BARE)
    forms = {
        "bare --help": [str(bare), "--help"],
        "dupr --help": dupr("--help"),
        "dupr recipe list": dupr("recipe", "list"),
    }
    show(medians(forms, tmp_path), "bare --help")
    forms = {
        "bare greet --help": [str(bare), "greet", "--help"],
        "dupr pretrain --help": dupr("pretrain", "--help"),
        "dupr evaluate voc --help": dupr("evaluate", "voc", "--help"),
    }
    show(medians(forms, tmp_path), "bare greet --help")


def test_dry_runs_beside_import_torch(tmp_path: Path, tiny_shards: Path) -> None:
    weights, out = random_weights(tmp_path / "w.safetensors"), tmp_path / "out"
    classes, tree = class_folders(tmp_path / "classes", 4, 2), make_tree(tmp_path / "tree")
    commands: dict[str, list[object]] = {
        "prepare": ["prepare", classes, out],
        "pretrain": ["pretrain", "dupr-r18-cpu-smoke", "--data", tiny_shards, "--out", out],
        "export": ["export", weights, "--to", "timm", "--out", out],
        "evaluate voc": ["evaluate", "voc", weights, "none", "--data", tree, "--out", out],
        "evaluate knn": ["evaluate", "knn", "none", "--data", classes, "--out", out],
        "demo": ["demo", "--out", out],
    }
    commands["pretrain"] += TINY_SET
    forms = {"import torch": ["-c", "import torch"]}
    forms |= {f"{name} --dry-run": dupr(*call, "--dry-run") for name, call in commands.items()}
    show(medians(forms, tmp_path), "import torch")
