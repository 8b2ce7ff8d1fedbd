"""The training loop: batches in, steps, and what is written between them.

A step is in step.py. A run continued from a checkpoint repeats the steps that an uninterrupted run
would have made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.run import CheckpointState, MetricsLog
from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.pretrain.data import BatchOrder, probe_batches, training_batches
from dupr_cli.pretrain.estimate import estimate_run, estimate_warnings
from dupr_cli.pretrain.monitor import Monitor
from dupr_cli.pretrain.retrieval_check import patch_retrieval
from dupr_cli.pretrain.step import Training, start_from_weights
from dupr_cli.pretrain.trackers import Trackers
from dupr_cli.progress import Reporter
from dupr_cli.recipe import recipe_digest
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.phases import phase
from dupr_cli.runtime.profiling import step_done
from dupr_cli.runtime.state import TrainingState
from dupr_cli.runtime.stopping import Limits, Stop, stopped
from dupr_cli.views.pairs import ViewPairBatch


def timed(batches: Iterator[ViewPairBatch]) -> Iterator[tuple[ViewPairBatch, float]]:
    """Batches, each with the seconds that the loop waited for it."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def count_steps(recipe: PretrainRecipe, images: int) -> int:
    """Length of the run in steps. images: in one epoch, without those held out."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return max(1, math.ceil(recipe.train.epochs * images / recipe.data.batch_size))


def checkpoint_facts(
    recipe: PretrainRecipe, step: int, pixels: PixelFormat | None
) -> CheckpointState:
    """What a checkpoint records besides its tensors. pixels: of the shards."""
    return CheckpointState(
        step=step,
        architecture=recipe.model.backbone,
        input_mean=list(recipe.method.augmentation.mean),
        input_std=list(recipe.method.augmentation.std),
        input_size=recipe.method.views.size,
        recipe_sha256=recipe_digest(recipe),
        method=recipe.method.title,
        input_range=None if pixels is None else list(pixels.range),
    )


def train(
    recipe: PretrainRecipe,
    shards: ShardSet,
    out: Path,
    world: World,
    reporter: Reporter,
    limits: Limits | None = None,
    track: Sequence[str] = (),
) -> dict[str, float]:
    """Run or continue a run in `out`; returns the last metrics. track: see `Trackers`.

    Raises RunError when too many steps in a row are not finite, and StoppedRunError when it is
    asked to stop before the end; the same call continues.
    """
    limits = limits or Limits()
    order = BatchOrder(shards, recipe)
    steps = count_steps(recipe, order.images)
    training = Training(recipe, steps, world)
    model = training.model
    state = TrainingState(str(out), out, model, training.optimizer, training.scaler, world)
    saved = state.load(reporter)
    done = saved.step if saved else 0
    if done >= steps:
        reporter.info(f"{out} is already complete: {done} steps")
        return MetricsLog(out).latest()
    expected = estimate_run(recipe, steps - done, world.device, world.size)
    reporter.info(f"estimate: {expected}")
    for warning in estimate_warnings(expected, world.device):
        reporter.warning(warning)
    loader, order = training_batches(shards, recipe, done, world)
    held_out = probe_batches(shards, recipe) if world.is_main else []
    trackers = Trackers(
        track if world.is_main else (), out, recipe.model_dump(mode="json"), reporter
    )
    monitor = Monitor(out, recipe, order.images, steps, done, world, reporter, trackers)

    def probe(step: int) -> None:
        backbone = model.query.backbone
        monitor.probe(step, patch_retrieval(backbone, held_out, recipe.method, world.device))

    with trackers:
        if done == 0:
            start_from_weights(model, recipe)
            probe(0)

        with (
            Stop(limits, launched=world.size > 1) as stop,
            closing(loader),  # ends its processes even if an error keeps this frame alive
            monitor,
            reporter.task("pretrain", steps, "steps", done) as progress,
        ):
            batches = timed(loader)
            for step in range(done, steps):
                with phase("data wait"):
                    batch, waited = next(batches)
                found = training.step(step, batch, stop.code)
                if found.finite:
                    monitor.good_step()
                    monitor.step(
                        step + 1, found.values, found.pair, model, batch, waited, found.facts
                    )
                else:
                    monitor.bad_step(step + 1, batch, shards)

                step_done()
                progress.advance(1, monitor.status)
                last, code = step + 1 == steps, found.stop_code
                stopping = not last and (code or stop.steps_are_done(step + 1 - done))
                if last or stopping or (step + 1) % recipe.train.checkpoint_every == 0:
                    state.save(
                        checkpoint_facts(recipe, step + 1, shards.pixels),
                        recipe.train.keep_checkpoints,
                        recipe.train.keep_every,
                    )
                if last or (step + 1) % recipe.train.probe_every == 0:
                    probe(step + 1)
                if stopping:
                    raise stopped(code, limits, f"step {step + 1} of {steps} is saved in {out}")
    return monitor.latest
