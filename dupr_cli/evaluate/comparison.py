"""The comparison: every weights given, fine-tuned and tested alike, results kept as they finish.

    OUT/evaluation.json             what all results in OUT have in common: recipe, data, device
    OUT/labels.json                 the images that are trained on, where not all are
    OUT/01-NAME/seed-0/             a trial: metrics.jsonl, checkpoints while it is under way,
                                    detections.json, and result.json, written last
    OUT/01-NAME/analysis/           curves, confusion and errors of its first trial
    OUT/results.json  table.txt  detections.png  curves.png

A trial whose result is there under the same fingerprint is not computed again, so an evaluation
that was killed goes on with what was not finished, and more weights or seeds can be added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.results import RESULTS, Results
from dupr_cli.artifacts.run import training_files
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.leaks import Leaks, find_leaks
from dupr_cli.evaluate.pictures import draw_curves, draw_detections
from dupr_cli.evaluate.results_table import table
from dupr_cli.evaluate.statistics import all_differences, summed_up
from dupr_cli.evaluate.subsets import LABELS_FILE, choose_labels, with_objects, write_labels
from dupr_cli.evaluate.trials import (
    DETECTIONS_FILE,
    Outcome,
    metric_of,
    read_outcome,
    run_trial,
    write_outcome,
)
from dupr_cli.evaluate.types import EvaluatePlan
from dupr_cli.metrics import METRIC_NAMES, Points
from dupr_cli.metrics.analysis import analyse
from dupr_cli.metrics.drawing import ANALYSIS_FILES, write_analysis
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights, open_compared
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    EvaluateRecipe,
    load_recipe,
    recipe_digest,
    recipe_keys,
    shipped_recipes,
)
from dupr_cli.runtime.output import (
    RESULT_FILE,
    Claim,
    environment,
    read_claim,
)
from dupr_cli.runtime.parallel import World, world_size
from dupr_cli.runtime.stopping import Limits

CLAIM_FILE = "evaluation.json"
TABLE_FILE = "table.txt"
DETECTIONS_PICTURE = "detections.png"
CURVES_PICTURE = "curves.png"
ANALYSIS_FOLDER = "analysis"

# Keys that change how an evaluation is carried out or shown, not what it measures; seeds are of
# trials, of which there may be more later.
_OPERATIONAL_KEYS = frozenset(
    {
        "description", "name", "seed", "trials", "train.workers", "train.log_every",
        "train.checkpoint_every", "train.reference_devices", "test.every", "test.pictures",
    }
)  # fmt: skip
# Batch statistics of fewer images than this are said to be noisy.
_SMALL_BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """Everything that was checked before the first iteration. notes: said with the results."""

    recipe: EvaluateRecipe
    candidates: list[ComparedWeights]
    train: LabelledSet
    test: LabelledSet
    classes: list[str]
    all_labels: int
    device: torch.device
    processes: int
    out: Path
    notes: list[str]

    @property
    def seeds(self) -> list[int]:
        return list(range(self.recipe.seed, self.recipe.seed + self.recipe.trials))

    @property
    def protocol(self) -> str:
        return self.recipe.name or self.recipe.protocol

    @property
    def metric_name(self) -> str:
        return METRIC_NAMES[metric_of(self.recipe)]

    def plan(self) -> EvaluatePlan:
        train = self.recipe.train
        return EvaluatePlan(
            protocol=self.protocol,
            changes=changes_to_protocol(self.recipe),
            metric=self.metric_name,
            weights=[candidate.address for candidate in self.candidates],
            architectures=[candidate.architecture for candidate in self.candidates],
            loaded=[candidate.loaded for candidate in self.candidates],
            train_images=len(self.train),
            test_images=len(self.test),
            classes=self.classes,
            iterations=train.iterations,
            epochs=round(train.iterations * train.batch_size / len(self.train), 2),
            seeds=self.seeds,
            device=str(self.device),
            processes=self.processes,
            notes=self.notes,
            out=str(self.out),
        )

    def fingerprint(self) -> dict[str, object]:
        """What must be the same for results to stand side by side, by recipe key or name."""
        return {
            **_measured_keys(self.recipe),
            "training images": self.train.digest,
            "test images": self.test.digest,
            "device": self.device.type,
            "processes": self.processes,
        }

    def claim(self) -> Claim:
        folders = [weights.folder for weights in self.candidates]
        defaults = recipe_keys(EvaluateRecipe().model_dump(mode="json"))
        return Claim(CLAIM_FILE, "evaluation", self.fingerprint(), folders, defaults)


def _measured_keys(recipe: EvaluateRecipe) -> dict[str, object]:
    """Recipe keys, dotted, that what is measured depends on."""
    keys = recipe_keys(recipe.model_dump(mode="json"))
    return {key: value for key, value in keys.items() if key not in _OPERATIONAL_KEYS}


def changes_to_protocol(recipe: EvaluateRecipe) -> dict[str, list[object]]:
    """Keys that are not as the recipe named `name` ships them: the value there, and the one used.

    Splits and the backbone are what data and weights are, not the protocol.
    """
    if recipe.name not in shipped_recipes("evaluate"):
        return {}
    shipped = _measured_keys(load_recipe(EvaluateRecipe, recipe.name))
    used = _measured_keys(recipe)
    free = ("data.train_splits", "data.test_splits", "detector.backbone")
    return {
        key: [shipped.get(key), used.get(key)]
        for key in sorted(shipped.keys() | used.keys())
        if shipped.get(key) != used.get(key) and key not in free
    }


def prepare_comparison(
    recipe: EvaluateRecipe,
    weights: Sequence[str],
    data: str,
    out: Path,
    device: torch.device,
    processes: int | None = None,
    notes: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Comparison:
    """Open and check weights and data; nothing is written.

    processes: of the run; those of this one by default. notes: said with the results.
    Raises UsageError for what cannot be used, RunError for damaged data.
    """
    reporter, processes = reporter or SilentReporter(), processes or world_size()
    notes = [*notes, *_about_batch(recipe, processes)]
    candidates = open_compared(weights, recipe.detector.backbone)
    splits, tested = recipe.data.train_splits, recipe.data.test_splits
    train = open_labelled(data, splits, reporter, masks=recipe.has_masks)
    test = train
    if tested != splits:
        test = open_labelled(data, tested, reporter, masks=recipe.has_masks)
    labelled, positions = with_objects(train), choose_labels(train, recipe.data)
    if not positions:
        raise UsageError(f"{data}: no image of the split {train.split!r} has an object.")
    unseen = sorted(set(test.classes) - set(train.classes))
    if unseen:
        reporter.warning(
            f"{data}: {', '.join(unseen)}: in the split {test.split} only, so no detector can "
            f"learn it; its AP of 0 counts in the mean."
        )
    shared = set(train.ids) & set(test.ids)
    if shared:
        reporter.warning(
            f"{data}: {len(shared)} images, the first is {min(shared)}, are in both "
            f"{train.split} and {test.split}: AP will be of images that were trained on."
        )
    test = test.subset(range(len(test))[: recipe.data.test_images])
    if all((a.difficult | a.crowd).all() for a in test.annotations):
        raise UsageError(
            f"{data}: the {len(test)} images of the split {test.split!r} have no object to find "
            f"(difficult ones are not counted)."
        )
    classes = sorted({*train.classes, *test.classes})
    return Comparison(
        recipe, candidates, train.subset(positions), test, classes, len(labelled), device,
        processes, out, notes,
    )  # fmt: skip


def _about_batch(recipe: EvaluateRecipe, processes: int) -> list[str]:
    """What to know about this batch. Raises UsageError when it cannot be split."""
    batch, norm = recipe.train.batch_size, recipe.detector.norm
    if batch % processes:
        raise UsageError(
            f"train.batch_size is {batch}, but {processes} processes each take an equal part of "
            f"it. Give a multiple of {processes}, or --scale-to-device. "
            f"(recipe key: train.batch_size)"
        )
    images = batch if norm == "sync" else batch // processes
    if norm == "frozen" or images >= _SMALL_BATCH:
        return []
    return [
        f"batch norm is trained with statistics of {images} images (the protocols have 16): they "
        f"are noisy, and AP comes out lower, for all weights. detector.norm=frozen does without."
    ]


def compare(
    comparison: Comparison,
    world: World,
    overwrite: bool,
    reporter: Reporter,
    limits: Limits | None = None,
    leaks_in: Sequence[str] = (),
) -> Results:
    """Run every trial that is not finished in OUT, and write the results. See `run`."""
    if world.is_main:
        _claim(comparison, overwrite)
        for note in comparison.notes:
            reporter.info(note)
    world.wait()
    outcomes = []
    for candidate in comparison.candidates:
        if candidate.weights is not None:
            reporter.info(f"{candidate.address}: {candidate.loaded}")
        outcomes.append(list(_outcomes(comparison, candidate, world, reporter, limits)))
    leaks: list[Leaks] = []
    if world.is_main:
        workers = comparison.recipe.train.workers
        leaks = [find_leaks(comparison.test, a, workers, reporter) for a in leaks_in]
        for found in leaks:
            if found.found:
                reporter.warning(str(found))
        _write_results(comparison, outcomes, leaks)
    world.wait()
    return Results.read(comparison.out)


def _outcomes(
    comparison: Comparison,
    candidate: ComparedWeights,
    world: World,
    reporter: Reporter,
    limits: Limits | None,
) -> Iterator[Outcome]:
    for seed in comparison.seeds:
        folder = comparison.out / candidate.folder / f"seed-{seed}"
        fingerprint = {
            **comparison.fingerprint(),
            "architecture": candidate.architecture,
            "weights": candidate.sha256 or RANDOM_WEIGHTS,
            "seed": seed,
        }
        outcome = read_outcome(
            folder, fingerprint, candidate.address, comparison.test, comparison.classes
        )
        world.wait()
        if outcome is not None:
            reporter.info(f"{candidate.folder}, seed {seed}: finished before, used again.")
        else:
            outcome = run_trial(
                comparison.recipe, candidate, comparison.train, comparison.test,
                comparison.classes, seed, folder, world, reporter, limits,
            )  # fmt: skip
            if world.is_main:
                write_outcome(folder, fingerprint, outcome, comparison.test, comparison.classes)
            world.wait()
        yield outcome


def _claim(comparison: Comparison, overwrite: bool) -> None:
    """Make OUT the folder of this evaluation, or make sure that it is already."""
    out = comparison.out
    comparison.claim().take(out, overwrite, output_files)
    if len(comparison.train) < comparison.all_labels:
        write_labels(out, comparison.train, comparison.recipe.data)


def output_files(out: Path) -> Iterator[Path]:
    """The files of an evaluation by its own record, which comes last; none without one."""
    if not (out / CLAIM_FILE).exists():
        return
    try:
        _, folders = read_claim(out / CLAIM_FILE)
    except UsageError:  # damaged: what it listed is found by what trials look like
        folders = []
    trials = [trial for name in folders for trial in (out / name).glob("seed-*")]
    # An older dupr listed no folders.
    trials = trials or list(out.glob("[0-9][0-9]-*/seed-*"))
    for trial in trials:
        yield trial / RESULT_FILE
        yield trial / DETECTIONS_FILE
        yield from training_files(trial)
    for folder in {trial.parent / ANALYSIS_FOLDER for trial in trials}:
        yield from (folder / name for name in ANALYSIS_FILES)
    names = (RESULTS, TABLE_FILE, LABELS_FILE, DETECTIONS_PICTURE, CURVES_PICTURE, CLAIM_FILE)
    yield from (out / name for name in names)


def _write_results(
    comparison: Comparison, outcomes: Sequence[Sequence[Outcome]], leaks: Sequence[Leaks]
) -> None:
    recipe, out = comparison.recipe, comparison.out
    names = [candidate.folder for candidate in comparison.candidates]
    rows = [
        summed_up(c.address, c.sha256, c.architecture, c.folder, [o.result for o in of_weights])
        for c, of_weights in zip(comparison.candidates, outcomes, strict=True)
    ]
    results = Results(
        protocol=comparison.protocol,
        metric=comparison.metric_name,
        train=comparison.train.identity,
        test=comparison.test.identity,
        classes=comparison.classes,
        results=rows,
        recipe=recipe.model_dump(mode="json"),
        recipe_sha256=recipe_digest(recipe),
        seeds=comparison.seeds,
        dupr_version=__version__,
        environment=environment(comparison.device, comparison.processes),
        changes=changes_to_protocol(recipe),
        differences=all_differences(rows, names),
        leaks=[found.to_json() for found in leaks],
        notes=[*comparison.notes, *(str(found) for found in leaks if found.found)],
    )
    first = {name: of[0] for name, of in zip(names, outcomes, strict=True)}
    _write_analyses(comparison, first)
    write_text(out / TABLE_FILE, table(results))
    draw_curves(out / CURVES_PICTURE, first)
    if recipe.test.pictures:
        draw_detections(
            out / DETECTIONS_PICTURE,
            comparison.test,
            comparison.classes,
            {name: outcome.detections for name, outcome in first.items()},
            recipe.test.pictures,
        )
    results.write(out)


def _write_analyses(comparison: Comparison, outcomes: Mapping[str, Outcome]) -> None:
    """Of the first trial of each of the weights."""
    test, classes = comparison.test, comparison.classes
    truths = [test.truth(i, classes) for i in range(len(test))]
    points: Points = "voc07" if comparison.recipe.test.metric == "voc07" else "voc10"
    for name, outcome in outcomes.items():
        folder = comparison.out / name / ANALYSIS_FOLDER
        folder.mkdir(exist_ok=True)
        write_analysis(folder, analyse(truths, outcome.detections, classes, points))
