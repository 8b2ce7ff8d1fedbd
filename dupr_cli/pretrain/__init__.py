"""Stage 2, `dupr pretrain`: shards and a recipe to a run directory with checkpoints.

trainer.py is the method, read from top to bottom; views, geometry, losses, queues and checkpoints
are modules of their own that it calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_json, write_text
from dupr_cli.artifacts.run import CHECKPOINTS, METRICS_FILE, RECIPE_FILE
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import PretrainRecipe, recipe_keys, recipe_yaml

# Keys that change how a run is carried out, not what it computes.
OPERATIONAL_KEYS = frozenset(
    {
        "description",
        "data.workers",
        "train.log_every",
        "train.probe_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
    }
)
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class PretrainPlan:
    """What a run will do, before it does it."""

    data: str
    images: int
    held_out: int
    steps: int
    epochs: float
    device: str
    out: str


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run left behind. metrics: the last values of metrics.jsonl."""

    run: str
    checkpoint: str
    steps: int
    metrics: dict[str, float]


def plan(recipe: PretrainRecipe, data: str, out: Path, device: str = "auto") -> PretrainPlan:
    """Check everything that `run` needs and say what it would do. Raises UsageError."""
    from dupr_cli.devices import choose_device
    from dupr_cli.pretrain.data import BatchOrder
    from dupr_cli.pretrain.trainer import count_steps

    shards = open_shards(data, recipe.data.split)
    order = BatchOrder(shards, recipe)
    steps = count_steps(recipe, order.images)
    return PretrainPlan(
        data=data,
        images=order.images,
        held_out=len(shards) - order.images,
        steps=steps,
        epochs=round(steps * recipe.data.batch_size / order.images, 2),
        device=str(choose_device(device)),
        out=str(out),
    )


def run(
    recipe: PretrainRecipe,
    data: str,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> PretrainResult:
    """Pre-train, or continue the run in `out` from its newest whole checkpoint.

    data: shards, see `open_shards`. device: auto, cpu, cuda or cuda:N.
    Raises UsageError when `out` holds something else or a run of another recipe or other data,
    RunError and InterruptedRunError as `trainer.train`.
    """
    from dupr_cli.artifacts.run import newest_checkpoint
    from dupr_cli.devices import choose_device
    from dupr_cli.pretrain.trainer import train

    chosen = choose_device(device)
    shards = open_shards(data, recipe.data.split)
    _claim(recipe, shards, out, overwrite)
    metrics = train(recipe, shards, out, chosen, reporter or SilentReporter())
    checkpoint = newest_checkpoint(out)
    return PretrainResult(str(out), str(checkpoint.path), checkpoint.state.step, metrics)


def _claim(recipe: PretrainRecipe, shards: ShardSet, out: Path, overwrite: bool) -> None:
    """Make `out` the directory of this run, or make sure that it is already."""
    recorded = out / RECIPE_FILE
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; --out needs a directory.")
    if recorded.is_file() and overwrite:
        for name in (RECIPE_FILE, ENVIRONMENT_FILE, METRICS_FILE, "latest"):
            (out / name).unlink(missing_ok=True)
        for events in out.glob("events.out.tfevents.*"):
            events.unlink()
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    elif recorded.is_file():
        _require_same_run(recipe, shards, out)
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: the directory is not empty and holds no run. Give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ENVIRONMENT_FILE, _environment(shards))
    # Last: from here on the directory is a run that can be continued.
    write_text(recorded, recipe_yaml(recipe))


def _require_same_run(recipe: PretrainRecipe, shards: ShardSet, out: Path) -> None:
    before = recipe_keys(yaml.safe_load((out / RECIPE_FILE).read_text()))
    now = recipe_keys(recipe.model_dump(mode="json"))
    changed = [
        f"  {key}: {before.get(key)} there, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in OPERATIONAL_KEYS
    ]
    environment = out / ENVIRONMENT_FILE
    digest = _data_digest(shards)
    if environment.is_file():
        there = json.loads(environment.read_text())["data"]
        if there["sha256"] != digest:
            changed.append(
                f"  data: {there['images']} images of {there['name']} there, "
                f"{len(shards)} images of {shards.name} now"
            )
    if changed:
        raise UsageError(
            f"{out}: a run with another recipe or other data is there:\n"
            + "\n".join(changed)
            + "\nGive the same recipe to continue it, another --out for a new run, or --overwrite "
            "to replace it."
        )


def _data_digest(shards: ShardSet) -> str:
    """Identity of the data: names, sizes and sample counts of the shards."""
    digest = hashlib.sha256()
    for path, count in zip(shards.shards, shards.counts, strict=True):
        digest.update(f"{path.name} {path.stat().st_size} {count}\n".encode())
    return digest.hexdigest()


def _environment(shards: ShardSet) -> dict[str, object]:
    import torch
    import torchvision

    return {
        "dupr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": {"name": shards.name, "images": len(shards), "sha256": _data_digest(shards)},
    }
