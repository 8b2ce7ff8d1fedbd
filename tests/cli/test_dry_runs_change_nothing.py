"""No `--dry-run` of any command changes one byte, whatever it finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dupr_cli.artifacts.shards import MANIFEST
from tests.support.trees import tree_bytes
from tests.support.workspace import Workspace, signalled, tiny_demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Outputs of every command, finished and unfinished, with files of others among them."""
    space = Workspace(tmp_path_factory.mktemp("space") / "space")
    assert space.prepare().code == 0
    assert space.pretrain("--stop-after", 2).code == 75
    assert space.evaluate().code == 0
    assert space.export().code == 0
    run = space.demo / "run" / "recipe.yaml"
    with tiny_demo(space.root), signalled(0, when=run.exists):
        assert space.run_demo().code == 75
    unfinished = space.root / "unfinished"
    (unfinished / ".prepare").mkdir(parents=True)
    for path in space.shards.iterdir():
        (unfinished / path.name).write_bytes(path.read_bytes())
    (unfinished / MANIFEST).rename(unfinished / ".prepare" / "state.json")
    (space.root / "foreign").mkdir()
    (space.root / "foreign" / "notes.txt").write_text("mine")
    for folder in (space.shards, space.run, space.evaluation, space.exported):
        (folder / "2024-notes").mkdir()
        (folder / "2024-notes" / "notes.txt").write_text("mine")
    return space


# A command and the outputs it is pointed at, besides a folder of others and none at all.
CASES = {
    "prepare": ("shards", "unfinished", "run"),
    "pretrain": ("run", "evaluation"),
    "voc": ("evaluation", "shards"),
    "patch-retrieval": ("evaluation",),
    "export": ("exported", "shards"),
    "demo": ("demo", "run"),
}


def command(space: Workspace, name: str, out: Path) -> list[object]:
    root = space.root
    commands: dict[str, list[object]] = {
        "prepare": [name, space.images, out, "--set", "shard.max_samples=10"],
        "pretrain": [name, root / "pretrain.yaml", "--data", space.shards, "--out", out],
        "voc": ["evaluate", name, "none", "--recipe", root / "evaluate.yaml", "--data", space.tree,
                "--out", out],
        "patch-retrieval": ["evaluate", name, "none", "--set", "backbone=resnet18",
                            "--data", space.shards, "--test-split", "train", "--out", out],
        "export": [name, space.run, "--to", "timm", "--out", out],
        "demo": [name, "--out", out],
    }  # fmt: skip
    return commands[name]


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_changes_nothing(workspace: Workspace, name: str) -> None:
    before = tree_bytes(workspace.root)
    for out in (*CASES[name], "foreign", "absent"):
        words = [*command(workspace, name, workspace.root / out), "--dry-run"]
        more = [[], ["--overwrite"], *([["--append"]] if name == "prepare" else [])]
        for options in more:
            done = workspace.dupr(*words, *options)
            assert done.code in (0, 2), done.output
            assert tree_bytes(workspace.root) == before, (words, options)


def test_a_dry_run_on_unfinished_work_keeps_it(tmp_path: Path) -> None:
    """The fault behind this file: looking removed what an interrupted call had written."""
    space = Workspace(tmp_path / "space", images=200)
    with signalled(0, when=(space.shards / ".prepare" / "state.json").exists):
        assert space.prepare("--set", "shard.max_samples=5").code == 75
    before = tree_bytes(space.root)
    assert any(name.startswith("shards/.prepare/") for name in before)
    assert space.prepare("--dry-run", "--set", "image.quality=80").code == 2
    assert space.prepare("--dry-run", "--overwrite", "--set", "image.quality=80").code == 0
    assert tree_bytes(space.root) == before
