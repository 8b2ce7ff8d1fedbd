"""Any order of commands, interruptions and other people's files over one tree of folders.

A state machine runs the real commands and shows after every step that no file which dupr did not
write was changed, and that nothing finished was lost without --overwrite.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dupr_cli.artifacts.run import list_checkpoints
from tests.support.trees import file_digests, tree_bytes
from tests.support.workspace import Outcome, Workspace, signalled, tiny_demo

# Where others may put their files: outputs, and folders within them that dupr makes.
PLACES = (
    "shards", "shards/2024-notes", "shards/.prepare", "run", "run/checkpoints", "evaluation",
    "evaluation/2024-notes", "evaluation/01-none", "evaluation/01-none/seed-0", "exported",
    "demo", "demo/run", "demo/images", "demo/evaluation/01-mine",
)  # fmt: skip
NAMES = ("notes.txt", "mine-000000.tar", "result.json.bak", ".keep.tmp", "README")
FLAGS = st.sampled_from([(), ("--overwrite",), ("--dry-run",), ("--dry-run", "--overwrite")])


def finished(root: Path) -> dict[str, str]:
    """Files that are whole once they are there, and are changed by nothing but --overwrite."""
    patterns = ("*.tar", "*.index.json", "result.json", "detections.json", "*.export.json")
    exported = {path for path in (root / "exported").rglob("*") if path.is_file()}
    found = {path for pattern in patterns for path in root.rglob(pattern)} | exported
    kept = [path.relative_to(root).as_posix() for path in found]
    digests = file_digests(root)
    return {name: digests[name] for name in kept if name in digests and ".prepare" not in name}


class Commands(RuleBasedStateMachine):
    """Commands over one workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="dupr-any-order-"))
        self.space = Workspace(self.root / "space", images=20)
        self.foreign: dict[str, str] = {}
        self.settled: dict[str, str] = {}
        self.steps = dict.fromkeys(("run", "demo/run"), 0)
        self.demo = tiny_demo(self.root)
        self.demo.__enter__()

    def teardown(self) -> None:
        self.demo.__exit__(None, None, None)
        shutil.rmtree(self.root)

    def after(self, done: Outcome, flags: tuple[str, ...], *outputs: str) -> None:
        """Check what a command did, and take note of what is finished now."""
        assert done.code in (0, 1, 2, 75), done.output
        now = finished(self.space.root)
        for name, digest in self.settled.items():
            replaced = "--overwrite" in flags and name.startswith(outputs)
            assert replaced or now.get(name) == digest, (name, flags, done.output)
        self.settled = {k: v for k, v in now.items() if k not in self.foreign}
        for run in self.steps:
            paths = list_checkpoints(self.space.root / run)
            step = int(paths[-1].name.removeprefix("step-")) if paths else 0
            if not ("--overwrite" in flags and run.startswith(outputs)):
                assert step >= self.steps[run], (run, flags, done.output)
            self.steps[run] = step

    def run(
        self, command: Callable[..., Outcome], flags: tuple[str, ...], *options: object
    ) -> Outcome:
        before = tree_bytes(self.space.root) if "--dry-run" in flags else None
        done = command(*options, *flags)
        if before is not None:
            assert tree_bytes(self.space.root) == before, done.output
        return done

    @initialize()
    def begin(self) -> None:
        self.after(self.space.prepare(), (), "shards")

    @rule(place=st.sampled_from(PLACES), name=st.sampled_from(NAMES), text=st.text(max_size=5))
    def somebody_writes_a_file(self, place: str, name: str, text: str) -> None:
        folder = self.space.root / place
        path = folder / name
        if path.exists() and path.relative_to(self.space.root).as_posix() not in self.foreign:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        key = path.relative_to(self.space.root).as_posix()
        self.foreign[key] = file_digests(folder)[name]

    @rule(count=st.integers(1, 3))
    def the_source_grows(self, count: int) -> None:
        self.space.add_images(count)

    @rule(data=st.data())
    def the_source_changes(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.space.images.glob("*.jpg"))))
        path.write_bytes(path.read_bytes() + b"x")

    @rule(flags=FLAGS, append=st.booleans(), size=st.sampled_from([10, 4]))
    def prepare(self, flags: tuple[str, ...], append: bool, size: int) -> None:
        options = ("--append",) if append and "--overwrite" not in flags else ()
        done = self.run(self.space.prepare, flags, "--set", f"shard.max_samples={size}", *options)
        self.after(done, flags, "shards")

    @rule(flags=FLAGS, blocks=st.integers(0, 3))
    def prepare_is_interrupted(self, flags: tuple[str, ...], blocks: int) -> None:
        folder = self.space.shards / ".prepare" / "blocks"

        def at_work() -> bool:
            return folder.is_dir() and len(list(folder.glob("*.json"))) >= 2 * blocks

        with signalled(0, when=at_work):
            done = self.run(self.space.prepare, flags, "--set", "shard.max_samples=4")
        self.after(done, flags, "shards")

    @rule(flags=FLAGS, stop=st.sampled_from([(), ("--stop-after", 1)]))
    def pretrain(self, flags: tuple[str, ...], stop: tuple[str, ...]) -> None:
        self.after(self.run(self.space.pretrain, flags, *stop), flags, "run")

    @rule(flags=FLAGS, seeds=st.integers(1, 2))
    def evaluate(self, flags: tuple[str, ...], seeds: int) -> None:
        done = self.run(self.space.evaluate, flags, "--seeds", seeds)
        self.after(done, flags, "evaluation")

    @rule(flags=FLAGS)
    def evaluate_is_interrupted(self, flags: tuple[str, ...]) -> None:
        trial = self.space.evaluation / "01-none" / "seed-0" / "checkpoints"
        with signalled(0, when=trial.exists):
            done = self.run(self.space.evaluate, flags)
        self.after(done, flags, "evaluation")

    @rule(flags=FLAGS)
    def export(self, flags: tuple[str, ...]) -> None:
        self.after(self.run(self.space.export, flags), flags, "exported")

    @rule(flags=FLAGS, seed=st.integers(0, 1), interrupted=st.booleans())
    def run_demo(self, flags: tuple[str, ...], seed: int, interrupted: bool) -> None:
        run = self.space.demo / "run" / "recipe.yaml"
        with signalled(0, when=lambda: interrupted and run.exists()):
            done = self.run(self.space.run_demo, flags, "--seed", seed)
        self.after(done, flags, "demo")

    @invariant()
    def files_of_others_are_as_they_were(self) -> None:
        now = file_digests(self.space.root)
        for name, digest in self.foreign.items():
            assert now.get(name) == digest, name


Commands.TestCase.settings = settings(
    max_examples=int(os.environ.get("DUPR_EXAMPLES", "3")),
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


TestAnyOrder = pytest.mark.slow(Commands.TestCase)
