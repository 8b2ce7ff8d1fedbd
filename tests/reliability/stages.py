"""The stages as `test_endings` runs them: their command, when they are at work, what they leave."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from dupr_cli.artifacts.run import MetricsLog
from tests.support import command_line
from tests.support.images import noise_image
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import SMALL_DETECTOR, SMALL_NETWORK, TINY

# What differs between two quiet calls, too: times, and where and when it was done.
VARYING = {"seconds", "environment", "created", "wall_seconds"}


@dataclass(frozen=True)
class Stage:
    """A command of dupr, given an output and a number of workers.

    begun: whether a call has come as far as its work. result: what must be the same in the end.
    workers: the numbers to try; None has none. forks: whether it can be forked from the tests.
    """

    name: str
    command: Callable[[Path, int | None], list[str]]
    begun: Callable[[Path], bool]
    result: Callable[[Path], dict[str, str]]
    workers: tuple[int | None, ...]
    forks: bool = True


@dataclass(frozen=True)
class Inputs:
    """Inputs of every stage, made once below `root`."""

    root: Path

    def make(self) -> None:
        images = self.root / "images"
        images.mkdir()
        for number in range(400):
            noise_image(number, 120, 80).save(images / f"{number:04d}.png")
        make_tree(self.root / "tree", 8, 4)
        command_line.dupr("prepare", images, self.root / "shards", "--workers", 1)
        command_line.pretrain(self.root / "shards", self.root / "run", "--steps", 4)
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), self.root / "public.pth")


def _words(*words: object) -> list[str]:
    return [sys.executable, "-m", "dupr_cli", *(str(word) for word in words)]


def _overrides(given: tuple[str, ...] | list[str]) -> list[str]:
    return [word for override in given for word in ("--set", override)]


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in VARYING}
    if isinstance(value, list):
        return [_without_times(entry) for entry in value]
    return value


def _weights_of(run: Path) -> dict[str, str]:
    steps = [line["step"] for line in MetricsLog(run).read() if "loss" in line]
    found = _digests(run / "latest")
    return {
        "model": found["model.safetensors"],
        "optimizer": found["optimizer.safetensors"],
        "logged once, in order": str(steps == sorted(set(steps))),
    }


def _results_of(evaluation: Path) -> dict[str, str]:
    found = json.loads((evaluation / "results.json").read_text())
    return {"results": json.dumps(_without_times(found["results"]), sort_keys=True)}


def stages(inputs: Inputs) -> Iterator[Stage]:
    root = inputs.root

    def prepare(out: Path, workers: int | None) -> list[str]:
        return _words(
            "prepare", root / "images", out, "--set", "shard.max_samples=5", "--workers", workers
        )

    def pretrain(out: Path, workers: int | None) -> list[str]:
        small = _overrides([*TINY, SMALL_NETWORK, f"data.workers={workers}"])
        return _words(
            "pretrain", "dupr-r18-cpu-smoke", "--data", root / "shards", "--out", out,
            *small, "--steps", 40,
        )  # fmt: skip

    def evaluate(out: Path, workers: int | None) -> list[str]:
        small = _overrides([*SMALL_DETECTOR, f"train.workers={workers}", "train.iterations=12"])
        return _words(
            "evaluate", "voc", root / "run", "none", "-r",
            "voc-frozen-tiny", "--data", root / "tree", "--out", out, "--device", "cpu",
            "--seeds", 2, *small,
        )  # fmt: skip

    def export(out: Path, _: int | None) -> list[str]:
        return _words("export", root / "run", "--out", out, "--to", "timm")

    def import_(out: Path, _: int | None) -> list[str]:
        return _words("import", root / "public.pth", "--out", out / "backbone.safetensors")

    yield Stage(
        "prepare", prepare, lambda out: any(out.glob(".prepare/blocks/*.json")), _digests,
        (1, 2), forks=False,
    )  # fmt: skip
    yield Stage(
        "pretrain", pretrain, lambda out: (out / "metrics.jsonl").exists(), _weights_of, (1, 2)
    )
    yield Stage(
        "evaluate", evaluate, lambda out: (out / "evaluation.json").exists(), _results_of, (1, 2)
    )
    yield Stage("export", export, Path.exists, _digests, (None,))
    yield Stage("import", import_, Path.exists, _digests, (None,))
