"""docs/slurm: the batch scripts run, with Slurm's own commands played by a few lines of shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import dupr
from tests.support.images import write_shards
from tests.support.labelled_scenes import make_tree
from tests.support.named_inputs import photographs, smallest
from tests.support.recipes import SMALL_NETWORK

SCRIPTS = Path(__file__).parents[1] / "docs" / "slurm"
# What was asked of Slurm goes to a file, an argument a line; $MORE makes a stage small.
COMMANDS = {
    "srun": 'exec "$@"',
    "sbatch": 'printf "%s\\n" sbatch "$@" >> "$ASKED"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$ASKED"; fi',
    "dupr": f'exec {sys.executable} -m dupr_cli "$@" $MORE',
}


class Node:
    """A machine on which Slurm starts jobs."""

    def __init__(self, home: Path) -> None:
        self.home, self.asked = home, home / "asked"
        self.asked.touch()
        (home / "bin").mkdir()
        for name, line in COMMANDS.items():
            (home / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (home / "bin" / name).chmod(0o755)

    def job(self, *words: object, more: str = "", **variables: object) -> int:
        """Run a script as Slurm does; its exit code."""
        environment = {
            **os.environ,
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "ASKED": str(self.asked),
            "MORE": more,
            **{f"SLURM_{name}": str(value) for name, value in variables.items()},
        }
        done = subprocess.run(
            ["bash", *map(str, words)], env=environment, cwd=self.home, check=False
        )
        return done.returncode


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.slow
def test_an_array_prepares_and_asks_for_its_merge_once(node: Node) -> None:
    photographs(node.home / "photos", count=30)
    for task in (1, 2):
        code = node.job(
            SCRIPTS / "prepare.sbatch", "photos", "shards", ARRAY_TASK_ID=task, ARRAY_TASK_MIN=1,
            ARRAY_TASK_COUNT=2, ARRAY_JOB_ID=7, CPUS_PER_TASK=1,
        )  # fmt: skip
        assert code == 0
    asked = node.asked.read_text().splitlines()
    assert asked[:2] == ["sbatch", "--dependency=afterok:7"]
    assert asked.count("sbatch") == 1
    wrapped = asked[asked.index("--wrap") + 1]
    assert node.job("-c", wrapped) == 0
    dupr("prepare", "verify", node.home / "shards")


@pytest.mark.slow
def test_a_run_that_was_stopped_is_put_back_in_the_queue_until_it_is_complete(node: Node) -> None:
    write_shards(node.home / "shards" / "in1k", 40)
    keys = " ".join(f"--set {key}" for key in (*smallest("dupr"), SMALL_NETWORK))
    small = f"{keys} --steps 4 --nproc 1 --nnodes 1 --device cpu"
    job = {"JOB_ID": 7, "JOB_NODELIST": "a", "NNODES": 2}
    script = SCRIPTS / "pretrain.sbatch"
    assert node.job(script, more=f"{small} --stop-after 2", **job) == 75
    assert node.asked.read_text() == "requeue 7\n"
    assert node.job(script, more=small, **job) == 0
    assert node.asked.read_text() == "requeue 7\n"
    assert (node.home / "runs/dupr-r50/checkpoints/step-00000004").is_dir()


@pytest.mark.slow
def test_a_study_plans_its_share(node: Node) -> None:
    write_shards(node.home / "shards" / "unlabelled", 300)
    make_tree(node.home / "data" / "VOC2012")
    few = "--set protocols.frozen.labels=[4,all] --set protocols.fine-tuned.labels=[4,all]"
    code = node.job(
        SCRIPTS / "study.sbatch", more=f"--dry-run --device cpu {few}", ARRAY_TASK_ID=1,
        ARRAY_TASK_COUNT=4, JOB_ID=7,
    )  # fmt: skip
    assert code == 0
