"""A folder in which all commands of dupr are run for real, at their smallest.

The images and the labelled set are made on the spot; every command goes through the command line,
in this process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

import dupr_cli.demo
from dupr_cli.cli.app import app
from tests.support.images import noise_image
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import TINY

EVALUATE = """
extends: voc-tiny
detector:
  backbone: resnet18
  roi_size: 4
  anchor_sizes: [32]
  rpn_pre_nms: [50, 50]
  rpn_post_nms: [20, 10]
  rois_per_image: 8
data: {train_sizes: [32], test_size: 32, max_size: 64}
train:
  iterations: 2
  batch_size: 2
  milestones: []
  workers: 0
  warmup: 0
  checkpoint_every: 1
test: {precise_bn_batches: 1, pictures: 1, score_threshold: 0.0}
"""

FROZEN = """
extends: voc-frozen-tiny
trials: 2
detector: {backbone: resnet18, pyramid_channels: 32, head_convolutions: 1, rpn_pre_nms: [50, 50]}
data: {train_sizes: [32], test_size: 32, max_size: 64, labels: [2, 4]}
train: {iterations: 2, batch_size: 2, workers: 0, warmup: 0, checkpoint_every: 1}
test: {precise_bn_batches: 1, pictures: 1, score_threshold: 0.0}
"""


def _as_yaml(overrides: Sequence[str]) -> str:
    """`a.b=c` overrides as nested YAML."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = yaml.safe_load(value)
    return yaml.safe_dump(tree)


PRETRAIN = "extends: dupr-r18-cpu-smoke\n" + _as_yaml(TINY)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. output: of both streams."""

    code: int
    output: str


class Workspace:
    """Inputs, tiny recipes, and the commands that read and write below `root`."""

    def __init__(self, root: Path, images: int = 40) -> None:
        self.root = root
        self.images, self.shards, self.run = root / "images", root / "shards", root / "run"
        self.tree, self.evaluation = root / "tree", root / "evaluation"
        self.exported, self.demo = root / "exported", root / "demo"
        self.images.mkdir(parents=True)
        self.add_images(images)
        make_tree(self.tree, 4, 2)
        (root / "evaluate.yaml").write_text(EVALUATE)
        (root / "pretrain.yaml").write_text(PRETRAIN)

    def add_images(self, count: int) -> None:
        first = len(list(self.images.glob("*.jpg")))
        for number in range(first, first + count):
            noise_image(number).save(self.images / f"{number:03d}.jpg")

    def dupr(self, *words: object) -> Outcome:
        """Run a command; any traceback fails the test."""
        runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"})
        done = runner.invoke(app, [str(word) for word in words])
        assert isinstance(done.exception, SystemExit | None), done.exception
        output = done.stdout + done.stderr
        assert "Traceback" not in output, output
        return Outcome(done.exit_code, output)

    def prepare(self, *options: object) -> Outcome:
        return self.dupr(
            "prepare", self.images, self.shards, "--set", "shard.max_samples=10",
            "--workers", 1, *options,
        )  # fmt: skip

    def pretrain(self, *options: object) -> Outcome:
        return self.dupr(
            "pretrain", self.root / "pretrain.yaml", "--data", self.shards, "--out", self.run,
            "--set", "train.steps=4", *options,
        )  # fmt: skip

    def evaluate(self, *options: object) -> Outcome:
        return self.dupr(
            "evaluate", "voc", "none", "--recipe", self.root / "evaluate.yaml",
            "--data", self.tree, "--out", self.evaluation, "--device", "cpu", *options,
        )  # fmt: skip

    def export(self, *options: object) -> Outcome:
        return self.dupr("export", self.run, "--out", self.exported, "--to", "timm", *options)

    def run_demo(self, *options: object) -> Outcome:
        return self.dupr("demo", "--out", self.demo, "--workers", 1, *options)


@contextmanager
def tiny_demo(root: Path) -> Iterator[None]:
    """`dupr demo` on a few scenes and steps instead of minutes of them."""
    pretrain, evaluate = root / "demo-pretrain.yaml", root / "demo-evaluate.yaml"
    pretrain.write_text(PRETRAIN)
    evaluate.write_text(FROZEN)
    values = {
        "UNLABELLED": 40,
        "LABELLED": {"train": 4, "val": 2},
        "PRETRAIN_RECIPE": str(pretrain),
        "EVALUATE_RECIPE": str(evaluate),
    }
    before = {name: getattr(dupr_cli.demo, name) for name in values}
    for name, value in values.items():
        setattr(dupr_cli.demo, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(dupr_cli.demo, name, value)


@contextmanager
def signalled(
    after: float,
    number: signal.Signals = signal.SIGTERM,
    when: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Send this process a signal, `after` seconds after `when` has become true.

    Only a command in here may see it.
    """
    ended = threading.Event()

    def send() -> None:
        while not when():
            if ended.wait(0.001):
                return
        if not ended.wait(after):
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_IGN)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()
        signal.signal(number, before)
