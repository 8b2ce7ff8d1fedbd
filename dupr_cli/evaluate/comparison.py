"""The comparison: train and test all given weights alike, and save each result when it is done.

    OUT/evaluation.json             what all results in OUT share: recipe, data, device
    OUT/labels.json                 the training images, if they are a subset; it lies in the trial
                                    if every seed draws its own
    OUT/features/                   of frozen backbones, until all trials are finished
    OUT/01-NAME/seed-0/             a trial: metrics.jsonl, checkpoints until it is finished,
                                    detections.json or predictions.zip, and result.json, last
    OUT/01-NAME/analysis/           curves, confusion and errors of its first trial
    OUT/results.json  table.txt  detections.png or predictions.png  curves.png

A trial whose result exists under the same fingerprint is not computed again, so an interrupted
evaluation continues with the unfinished trials, and more weights or seeds can be added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.results import RESULTS, Results, WeightsResult
from dupr_cli.artifacts.run import training_files
from dupr_cli.artifacts.weights import SUPERVISED
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.datasets.pixel_statistics import measured_input
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.architectures import check_architecture, dilation_notes
from dupr_cli.evaluate.features import (
    FEATURES_FOLDER,
    Features,
    feature_files,
    open_features,
)
from dupr_cli.evaluate.leaks import Leaks, find_leaks
from dupr_cli.evaluate.learning_rates import (
    ChosenRate,
    RateTrial,
    choose_rate,
    validation_fold,
    with_rate,
)
from dupr_cli.evaluate.pictures import draw_curves
from dupr_cli.evaluate.results_table import table
from dupr_cli.evaluate.statistics import all_differences, summed_up
from dupr_cli.evaluate.subsets import (
    LABELS_FILE,
    choose_labels,
    draw_note,
    require_objects,
    with_objects,
    write_labels,
)
from dupr_cli.evaluate.tasks import Detection, Segmentation, Task, task_of
from dupr_cli.evaluate.trials import (
    Outcome,
    read_outcome,
    remove_checkpoints,
    run_trial,
    write_outcome,
)
from dupr_cli.evaluate.types import EvaluatePlan
from dupr_cli.metrics.drawing import ANALYSIS_FILES
from dupr_cli.models.compared import RANDOM_WEIGHTS, ComparedWeights, open_compared, taking
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
    remove,
)
from dupr_cli.runtime.parallel import World, world_size
from dupr_cli.runtime.stopping import Limits

CLAIM_FILE = "evaluation.json"
# How masks are pasted, in the record of an output: those of an older dupr are not comparable.
_MASKS = "masks pasted"
TABLE_FILE = "table.txt"
CURVES_PICTURE = "curves.png"
ANALYSIS_FOLDER = "analysis"

# Keys that change how an evaluation is carried out or shown, but not what it measures. Seeds belong
# to trials, and more trials may be added later.
_OPERATIONAL_KEYS = frozenset(
    {
        "description", "name", "seed", "trials", "train.workers", "train.log_every",
        "train.checkpoint_every", "train.reference_devices", "test.every", "test.pictures",
    }
)  # fmt: skip
# Batch statistics of fewer images than this are reported as noisy.
_SMALL_BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """Everything that was checked before the first iteration.

    labelled: all images with labels to train on. draws: those that the trial of each seed trains
    on. needed: those of any trial that shares the features of frozen backbones, which are in the
    folder `features`. notes: reported with the results.
    """

    recipe: EvaluateRecipe
    weights: list[ComparedWeights]
    labelled: LabelledSet
    draws: dict[int, LabelledSet]
    needed: LabelledSet
    test: LabelledSet
    classes: list[str]
    device: torch.device
    processes: int
    out: Path
    features: Path
    notes: list[str]

    @property
    def train(self) -> LabelledSet:
        """The training images, of the first seed if every seed draws its own."""
        return self.draws[self.seeds[0]]

    @property
    def seeds(self) -> list[int]:
        return list(range(self.recipe.seed, self.recipe.seed + self.recipe.trials))

    @property
    def protocol(self) -> str:
        return self.recipe.name or self.recipe.protocol

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

    def plan(self) -> EvaluatePlan:
        train = self.recipe.train
        return EvaluatePlan(
            protocol=self.protocol,
            changes=changes_to_protocol(self.recipe),
            metric=self.task.metric_name,
            weights=[compared.address for compared in self.weights],
            architectures=[compared.architecture for compared in self.weights],
            loaded=[compared.loaded for compared in self.weights],
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
        """What must be equal for results to be compared, by recipe key or name."""
        masks = {_MASKS: "at the centres of pixels"} if self.recipe.has_masks else {}
        return {
            **_measured_keys(self.recipe),
            **masks,
            "training images": (self.labelled if self.varies else self.train).digest,
            "test images": self.test.digest,
            "device": self.device.type,
            "processes": self.processes,
            **({"pixels": str(self.test.pixels)} if self.test.pixels else {}),
        }

    @property
    def varies(self) -> bool:
        """Whether every seed trains on its own draw of the labelled images."""
        labels = self.recipe.data.labels
        stored = isinstance(labels, str) and labels.endswith(".json")
        return self.recipe.data.labels_vary and not stored and len(self.train) < len(self.labelled)

    def trial_fingerprint(self, compared: ComparedWeights, seed: int) -> dict[str, object]:
        """What identifies the result of one trial."""
        frozen = self.recipe.is_frozen and compared.weights is None
        return {
            **self.fingerprint(),
            "training images": self.draws[seed].digest,
            "architecture": compared.architecture,
            "weights": compared.sha256 or RANDOM_WEIGHTS,
            "seed": seed,
            **({"seed of the random backbone": self.recipe.seed} if frozen else {}),
        }

    def claim(self) -> Claim:
        folders = [weights.folder for weights in self.weights]
        defaults = recipe_keys(EvaluateRecipe().model_dump(mode="json"))
        defaults[_MASKS] = "at whole pixels"
        return Claim(CLAIM_FILE, "evaluation", self.fingerprint(), folders, defaults)


def _measured_keys(recipe: EvaluateRecipe) -> dict[str, object]:
    """The recipe keys, dotted, that affect the measurement."""
    keys = recipe_keys(recipe.model_dump(mode="json"))
    return {key: value for key, value in keys.items() if key not in _OPERATIONAL_KEYS}


def changes_to_protocol(recipe: EvaluateRecipe) -> dict[str, list[object]]:
    """Keys that differ from the shipped recipe `name`: the value there, and the one used.

    Splits and the backbone describe the data and the weights, so they are not compared.
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

    processes: of the run; those of this one by default. notes: reported with the results. If
    `data.labels` is a list, the comparison is that of all labels; see `with_labels`.
    Raises UsageError for unusable input, RunError for damaged data.
    """
    reporter, processes = reporter or SilentReporter(), processes or world_size()
    task, metric = task_of(recipe), recipe.primary_metric
    notes = [*notes, *_batch_notes(recipe, processes)]
    compared = open_compared(weights, recipe.detector.backbone)
    architectures = {one.architecture for one in compared}
    for architecture in architectures:
        check_architecture(recipe, architecture)
    notes += dilation_notes(recipe, architectures)
    splits, tested = recipe.data.train_splits, recipe.data.test_splits
    compared = taking(compared, lambda: measured_input(data))
    pixels = compared[0].input.pixels
    train = task.open(data, splits, pixels, reporter)
    labelled = train.subset(with_objects(train))
    if not len(labelled):
        what = "a labelled pixel" if recipe.is_semantic else "an object"
        raise UsageError(f"{data}: no image of the split {train.split!r} has {what}.")
    test = train
    if recipe.data.validation is not None:
        labelled, test = validation_fold(
            labelled, recipe.data.validation, recipe.data.labels_seed, "data.validation"
        )
        train = labelled
        notes.append(
            f"tested on {len(test)} of the labelled images of {train.split}, which are not trained "
            f"on: a figure to choose settings by, not to report (data.validation)."
        )
    elif tested != splits:
        test = task.open(data, tested, pixels, reporter)
    unseen = sorted(test.named - train.named)
    if unseen:
        reporter.warning(
            f"{data}: {', '.join(unseen)}: these classes are in the split {test.split} only, so "
            f"they cannot be learned; their {metric} of 0 counts in the mean."
        )
    shared = set(train.ids) & set(test.ids)
    if shared:
        reporter.warning(
            f"{data}: {len(shared)} images, the first is {min(shared)}, are in both "
            f"{train.split} and {test.split}: {metric} will include images that were trained on."
        )
    test = test.subset(range(len(test))[: recipe.data.test_images])
    require_objects(test, f"the split {test.split!r}")
    classes = task.classes(train, test)
    whole = Comparison(
        recipe, compared, labelled, {}, labelled, test, classes, device, processes, out,
        out / FEATURES_FOLDER, notes,
    )  # fmt: skip
    labels = recipe.data.labels
    if isinstance(labels, list):
        return replace(with_labels(whole, None, out), recipe=recipe)
    return with_labels(whole, labels, out)


def with_labels(whole: Comparison, labels: int | str | None, out: Path) -> Comparison:
    """The comparison with some of the labels, in the folder `out`.

    Raises UsageError when `labels` names a file that does not fit the images.
    """
    data = whole.recipe.data.model_copy(update={"labels": labels})
    recipe = whole.recipe.model_copy(update={"data": data})
    draws = {
        seed: whole.labelled.subset(
            choose_labels(whole.labelled, data, seed if data.labels_vary else None)
        )
        for seed in whole.seeds
    }
    drawn = {image_id for draw in draws.values() for image_id in draw.ids}
    positions = [i for i, image_id in enumerate(whole.labelled.ids) if image_id in drawn]
    notes = [*whole.notes, draw_note(whole.labelled, draws[whole.seeds[0]], data)]
    return replace(
        whole,
        recipe=recipe,
        draws=draws,
        needed=whole.labelled.subset(positions),
        out=out,
        notes=[note for note in notes if note],
    )


def _batch_notes(recipe: EvaluateRecipe, processes: int) -> list[str]:
    """Notes about the batch size. Raises UsageError when the batch cannot be split."""
    batch, norm = recipe.train.batch_size, recipe.detector.norm
    if recipe.is_frozen and processes > 1:
        raise UsageError(
            "frozen evaluation runs in one process: its trials take a minute each, and share their "
            "features. Leave --nproc out; `dupr study --task I/N` shares out weights."
        )
    if batch % processes:
        raise UsageError(
            f"train.batch_size is {batch}, which does not divide equally among {processes} "
            f"processes. Give a multiple of {processes}, or --scale-to-device. "
            f"(recipe key: train.batch_size)"
        )
    images = batch if norm == "sync" else batch // processes
    if norm == "frozen" or recipe.is_frozen or images >= _SMALL_BATCH:
        return []
    return [
        f"batch norm is trained with statistics of {images} images (16 in the protocols): they are "
        f"noisy, and {recipe.primary_metric} is lower for all weights. detector.norm=frozen avoids "
        f"this."
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
    outcomes, rates = [], []
    for compared in comparison.weights:
        if compared.weights is not None:
            reporter.info(f"{compared.address}: {compared.loaded}")
        of_weights, rate = _Trials(comparison, compared, world, reporter, limits).all()
        outcomes.append(of_weights)
        rates.append(rate)
    leaks: list[Leaks] = []
    if world.is_main:
        workers = comparison.recipe.train.workers
        leaks = [find_leaks(comparison.test, a, workers, reporter) for a in leaks_in]
        for found in leaks:
            if found.found:
                reporter.warning(str(found))
        _write_results(comparison, outcomes, rates, leaks)
        if comparison.features.parent == comparison.out:
            remove(comparison.out, feature_files(comparison.features))
    world.wait()
    return Results.read(comparison.out)


@dataclass
class _Trials:
    """The trials of one of the weights, run or read; features are computed when one is run."""

    comparison: Comparison
    compared: ComparedWeights
    world: World
    reporter: Reporter
    limits: Limits | None
    features: Features | None = None
    ran: bool = False  # a trial in this call

    @property
    def folder(self) -> Path:
        return self.comparison.out / self.compared.folder

    def all(self) -> tuple[list[Outcome], ChosenRate | None]:
        """The outcome of each seed, and the learning rate if a grid was tried."""
        recipe, rate = self.comparison.recipe, None
        if recipe.train.lr_grid:
            first = self.comparison.seeds[0]
            rate = choose_rate(recipe, self.comparison.train, self.folder, first, self._of_rate)
            metric = recipe.primary_metric
            shown = ", ".join(f"{lr:.3g}: {metric} {v:.1f}" for lr, v in rate.scores.items())
            self.reporter.info(f"{self.compared.folder}: lr {rate.lr:.3g} ({shown})")
            recipe = with_rate(recipe, rate.lr)
        return [self._of_seed(recipe, seed, rate) for seed in self.comparison.seeds], rate

    def _of_seed(self, recipe: EvaluateRecipe, seed: int, rate: ChosenRate | None) -> Outcome:
        comparison, folder = self.comparison, self.folder / f"seed-{seed}"
        fingerprint = comparison.trial_fingerprint(self.compared, seed)
        if rate is not None:
            fingerprint["chosen lr"] = rate.lr
        draw = comparison.draws[seed]
        if self.world.is_main and comparison.varies:
            folder.mkdir(parents=True, exist_ok=True)
            write_labels(folder, draw, recipe.data)
        return self._finished(recipe, seed, folder, fingerprint, (draw, comparison.test))

    def _of_rate(self, trial: RateTrial) -> Outcome:
        seed = self.comparison.seeds[0]
        train, validation = trial.fold
        fingerprint = {
            **self.comparison.trial_fingerprint(self.compared, seed),
            "training images": train.digest,
            "test images": validation.digest,
            "tried lr": trial.recipe.train.lr,
        }
        return self._finished(trial.recipe, seed, trial.folder, fingerprint, trial.fold)

    def _finished(
        self,
        recipe: EvaluateRecipe,
        seed: int,
        folder: Path,
        fingerprint: Mapping[str, object],
        sets: tuple[LabelledSet, LabelledSet],
    ) -> Outcome:
        """The result in `folder`, or that of a trial that runs now. sets: to train and test on."""
        comparison, compared, (train, test) = self.comparison, self.compared, sets
        classes = comparison.classes
        outcome = read_outcome(
            comparison.task, folder, fingerprint, compared.address, test, classes
        )
        self.world.wait()
        if outcome is not None:
            kind, _, value = folder.name.partition("-")
            self.reporter.info(
                f"{compared.folder}, {kind} {value}: finished before; its result is reused."
            )
            if self.world.is_main:
                remove_checkpoints(folder)
            return outcome
        # Several processes must agree to stop, which they do within the training.
        if self.ran and self.limits is not None and self.world.size == 1:
            self.limits.require_time(
                f"the trials of {compared.folder} before {folder.name} are kept"
            )
        self.ran = True
        outcome = run_trial(
            recipe, compared, train, test, classes, seed, folder, self.world, self.reporter,
            self.limits, self._features_for(test),
        )  # fmt: skip
        if self.world.is_main:
            write_outcome(comparison.task, folder, fingerprint, outcome, test, classes)
        self.world.wait()
        return outcome

    def _features_for(self, test: LabelledSet) -> Features | None:
        comparison = self.comparison
        if not comparison.recipe.is_frozen:
            return None
        if self.features is None:
            self.features = open_features(
                comparison.features, self.compared, comparison.recipe, comparison.labelled,
                comparison.needed, comparison.test, comparison.classes, self.world.device,
                self.reporter,
            )  # fmt: skip
        if test is comparison.test:
            return self.features
        return replace(self.features, test=self.features.train)


def _claim(comparison: Comparison, overwrite: bool) -> None:
    """Make OUT the folder of this evaluation, or check that it already is."""
    out = comparison.out
    comparison.claim().take(out, overwrite, output_files)
    if len(comparison.train) < len(comparison.labelled) and not comparison.varies:
        write_labels(out, comparison.train, comparison.recipe.data)


def output_files(out: Path) -> Iterator[Path]:
    """The files of an evaluation by its own record, which comes last; empty without a record."""
    if not (out / CLAIM_FILE).exists():
        return
    try:
        _, folders = read_claim(out / CLAIM_FILE)
    except UsageError:  # damaged: trials are recognised by their folder names
        folders = []
    kinds = ("seed-*", "lr-*")
    trials = [t for name in folders for kind in kinds for t in (out / name).glob(kind)]
    # Older versions of dupr recorded no folders.
    trials = trials or [t for kind in kinds for t in out.glob(f"[0-9][0-9]-*/{kind}")]
    for trial in trials:
        yield trial / RESULT_FILE
        yield from (trial / task.found_file for task in (Detection, Segmentation))
        yield trial / LABELS_FILE
        yield from training_files(trial)
    for folder in {trial.parent / ANALYSIS_FOLDER for trial in trials}:
        yield from (folder / name for name in ANALYSIS_FILES)
    yield from feature_files(out / FEATURES_FOLDER)
    pictures = (Detection.picture, Segmentation.picture, CURVES_PICTURE)
    names = (RESULTS, TABLE_FILE, LABELS_FILE, *pictures, CLAIM_FILE)
    yield from (out / name for name in names)


def _write_results(
    comparison: Comparison,
    outcomes: Sequence[Sequence[Outcome]],
    rates: Sequence[ChosenRate | None],
    leaks: Sequence[Leaks],
) -> None:
    recipe, out = comparison.recipe, comparison.out
    names = [compared.folder for compared in comparison.weights]
    rows = [
        summed_up(c.address, c.sha256, c.architecture, c.folder, [o.result for o in of_weights])
        for c, of_weights in zip(comparison.weights, outcomes, strict=True)
    ]
    results = Results(
        protocol=comparison.protocol,
        metric=comparison.task.metric_name,
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
        notes=[
            *comparison.notes,
            *_notes_on_draws(comparison),
            *(str(found) for found in leaks if found.found),
            *_notes_on_rates(comparison, names, rates),
            *_notes_on_supervised(comparison, rows),
        ],
    )
    first = {name: of[0] for name, of in zip(names, outcomes, strict=True)}
    task, test, classes = comparison.task, comparison.test, comparison.classes
    for name, outcome in first.items():
        folder = out / name / ANALYSIS_FOLDER
        folder.mkdir(exist_ok=True)
        task.analyse(folder, test, classes, outcome.found)
    write_text(out / TABLE_FILE, table(results))
    draw_curves(out / CURVES_PICTURE, first, recipe.primary_metric)
    if recipe.test.pictures:
        found = {name: outcome.found for name, outcome in first.items()}
        task.draw(out / task.picture, test, classes, found, recipe.test.pictures)
    results.write(out)


def _notes_on_draws(comparison: Comparison) -> list[str]:
    if not comparison.varies:
        return []
    return [
        f"every seed trains on its own draw of {len(comparison.train)} of the "
        f"{len(comparison.labelled)} labelled images, the same for all weights; the images named "
        f"here are those of seed {comparison.seeds[0]}."
    ]


def _notes_on_rates(
    comparison: Comparison, names: Sequence[str], rates: Sequence[ChosenRate | None]
) -> list[str]:
    """Which learning rate each of the weights got, if a grid was tried."""
    chosen = [f"{name} {rate.lr:.3g}" for name, rate in zip(names, rates, strict=True) if rate]
    if not chosen:
        return []
    train = comparison.recipe.train
    return [
        f"lr was chosen for each of the weights from {sorted(train.lr_grid)} times {train.lr:g}, "
        f"by {comparison.recipe.primary_metric} on {train.lr_validation:.0%} of the training "
        f"labels: {', '.join(chosen)}."
    ]


def _notes_on_supervised(comparison: Comparison, rows: Sequence[WeightsResult]) -> list[str]:
    """A plain warning if weights that were trained with labels have the highest result."""
    metric = comparison.recipe.primary_metric
    best = max(range(len(rows)), key=lambda i: rows[i].metrics[metric])
    weights = comparison.weights[best].weights
    if len(rows) < 2 or weights is None or weights.metadata.encoder != SUPERVISED:
        return []
    return [
        f"{rows[best].weights} was trained with the labels of another data set and has the highest "
        f"{metric} here: none of the other weights replaces it for this detector."
    ]
