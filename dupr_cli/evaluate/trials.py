"""One trial: train a detector or an FCN from one of the weights with one seed, and test it.

The result is kept in the trial's folder and reused if it is whole and of the same evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dupr_cli.artifacts.files import remove_leftovers
from dupr_cli.artifacts.results import TrialResult
from dupr_cli.artifacts.run import CHECKPOINTS, METRICS_FILE, training_files
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.evaluate.detection_data import Batch
from dupr_cli.evaluate.features import Features, measured_batches, training_pixels
from dupr_cli.evaluate.inference import find_all, positions_of
from dupr_cli.evaluate.tasks import Found, Task, task_of, test_batches, training_batches
from dupr_cli.evaluate.training import LossRecord, Trial, measure_batch_norm, train_detector
from dupr_cli.metrics import Scores
from dupr_cli.models.batch_norm import measured_statistics
from dupr_cli.models.compared import ComparedWeights
from dupr_cli.parsing import validated
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.base import Level
from dupr_cli.runtime.output import damaged_result, read_result, remove, write_result
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.stopping import Limits

if TYPE_CHECKING:
    from dupr_cli.evaluate.detectors import Detector, FrozenDetector


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial, as the pictures and the table need it."""

    result: TrialResult
    losses: list[LossRecord]
    found: Sequence[Found]


def run_trial(
    recipe: EvaluateRecipe,
    compared: ComparedWeights,
    train: LabelledSet,
    test: LabelledSet,
    classes: Sequence[str],
    seed: int,
    folder: Path,
    world: World,
    reporter: Reporter,
    limits: Limits | None,
    features: Features | None = None,
) -> Outcome:
    """Train, measure batch norm, test; continues from the state saved in `folder`.

    features: of the backbone, if all of it is frozen.
    Raises RunError, StoppedRunError; see `train_detector`.
    """
    # Detectors are made of torchvision's parts, whose import no dry run needs to wait for.
    from dupr_cli.evaluate.detectors import build_detector, build_frozen_detector

    reporter = reporter if world.is_main else SilentReporter()
    name = compared.folder if recipe.trials == 1 else f"{compared.folder} seed {seed}"
    task = task_of(recipe)
    detector: Detector | FrozenDetector
    if features is not None:
        detector = build_frozen_detector(recipe, features.backbone, len(classes), seed, world)
    else:
        detector, _ = build_detector(
            recipe, compared.architecture, len(classes), compared.weights, seed, world,
            compared.input, train.keypoint_count,
        )  # fmt: skip
        if recipe.detector.frozen is not None:
            _freeze(detector, recipe, recipe.detector.frozen, train, classes)
    trial = Trial(detector, recipe, seed, name, folder, world)
    test_positions = positions_of(world, len(test))

    def batches_from(start: int) -> Generator[Batch, None, None]:
        if features is not None:
            return features.training_batches(train, recipe, classes, seed, start)
        return training_batches(train, recipe, classes, seed, start, world)

    def test_images() -> Generator[Batch, None, None]:
        if features is not None:
            return features.test_batches(test)
        return test_batches(test, recipe, classes, test_positions, world)

    def tested(reporter: Reporter) -> tuple[Sequence[Found], Scores]:
        with closing(test_images()) as batches:
            found = find_all(task.output, detector, batches, test, name, world, reporter)
        return found, task.scores(test, classes, found)

    started = time.perf_counter()
    train_detector(
        trial, batches_from, reporter, limits, lambda: tested(SilentReporter())[1].metrics
    )
    trained = time.perf_counter()
    if recipe.test.precise_bn_batches:
        with closing(batches_from(recipe.train.iterations)) as batches:
            measure_batch_norm(trial, batches, reporter)
    measured = time.perf_counter()
    found, scores = tested(reporter)
    ended = time.perf_counter()
    losses = trial.losses()
    return Outcome(
        TrialResult(
            seed=seed,
            metrics=scores.metrics,
            per_class=scores.per_class,
            seconds={
                "train": trained - started,
                "precise_bn": measured - trained,
                "test": ended - measured,
            },
            extra={"final_loss": losses[-1].total if losses else None},
            curve=[line for line in trial.log.read() if recipe.primary_metric in line],
        ),
        losses,
        found,
    )


def _freeze(
    detector: Detector,
    recipe: EvaluateRecipe,
    level: Level,
    train: LabelledSet,
    classes: Sequence[str],
) -> None:
    """Freeze the backbone up to a level, with batch norm measured on the training images."""
    from dupr_cli.evaluate.detectors.norms import freeze_up_to

    count = measured_batches(recipe, train)
    with measured_statistics(detector.backbone):
        for images in training_pixels(recipe, train, classes, count):
            detector.backbone(detector.normalised(images).tensors)
    freeze_up_to(detector.backbone, level)


def read_outcome(
    task: Task,
    folder: Path,
    fingerprint: Mapping[str, object],
    address: str,
    test: LabelledSet,
    classes: Sequence[str],
) -> Outcome | None:
    """A result that an earlier call wrote, or None if no whole one exists.

    Raises UsageError when the folder holds the result of other weights, or a damaged one.
    """
    values = read_result(folder, fingerprint, address)
    if values is None:
        return None
    try:
        result = validated(TrialResult, values["result"])
        losses = validated(list[LossRecord], values["losses"])
        found = task.read(folder, test, classes)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged_result(folder, error) from error
    return Outcome(result, losses, found)


def write_outcome(
    task: Task,
    folder: Path,
    fingerprint: Mapping[str, object],
    outcome: Outcome,
    test: LabelledSet,
    classes: Sequence[str],
) -> None:
    """Write what was found and the result, then delete the checkpoints: they are not needed."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    task.write(folder, outcome.found, test, classes)
    write_result(
        folder,
        fingerprint,
        {
            "result": asdict(outcome.result),
            "losses": [asdict(record) for record in outcome.losses],
        },
    )
    remove_checkpoints(folder)


def remove_checkpoints(folder: Path) -> None:
    """Delete what only an unfinished trial needs; a call that was killed may have left some."""
    if (folder / CHECKPOINTS).is_dir():
        remove_leftovers(folder / CHECKPOINTS)
    kept = (folder / METRICS_FILE,)
    remove(folder, [path for path in training_files(folder) if path not in kept])
