"""The comparison: every weights given, fine-tuned and tested alike, results kept as they finish.

    OUT/evaluation.json          what all results in OUT have in common: recipe, data, device
    OUT/01-NAME/result.json      one of the weights, with its fingerprint; written last
    OUT/01-NAME/detections.json  its detections on the test images
    OUT/results.json  table.txt  detections.png  losses.png

A result that is there under the same fingerprint is not computed again, so an evaluation that was
killed goes on with the weights that were not finished.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torchvision

from dupr_cli import __version__
from dupr_cli.artifacts.files import remove_leftovers, write_json, write_text
from dupr_cli.artifacts.results import RESULTS, Results, WeightsResult
from dupr_cli.devices import choose_device
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.batches import test_batches, training_batches, training_positions
from dupr_cli.evaluate.candidates import RANDOM_WEIGHTS, Candidate, open_candidates
from dupr_cli.evaluate.detector import build_detector
from dupr_cli.evaluate.inference import detect_all
from dupr_cli.evaluate.labelled import LabelledSet, open_labelled
from dupr_cli.evaluate.metrics import METRIC_NAMES, Detections
from dupr_cli.evaluate.metrics.voc import voc_scores
from dupr_cli.evaluate.pictures import draw_detections, draw_losses
from dupr_cli.evaluate.report import detection_rows, detections_from_rows, table
from dupr_cli.evaluate.training import LossRecord, measure_batch_norm, train_detector
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import EvaluateRecipe, recipe_digest, recipe_keys

CLAIM_FILE = "evaluation.json"
RESULT_FILE = "result.json"
DETECTIONS_FILE = "detections.json"
TABLE_FILE = "table.txt"
DETECTIONS_PICTURE = "detections.png"
LOSSES_PICTURE = "losses.png"

# Keys that change how an evaluation is carried out or shown, not what it measures.
_OPERATIONAL_KEYS = frozenset({"description", "train.workers", "train.log_every", "test.pictures"})


@dataclass(frozen=True)
class EvaluatePlan:
    """What an evaluation will do, before it does it."""

    protocol: str
    metric: str
    weights: list[str]
    architectures: list[str]
    train_images: int
    test_images: int
    classes: list[str]
    iterations: int
    epochs: float
    device: str
    out: str


@dataclass(frozen=True)
class Comparison:
    """Everything that was checked before the first iteration."""

    recipe: EvaluateRecipe
    candidates: list[Candidate]
    train: LabelledSet
    test: LabelledSet
    classes: list[str]
    device: torch.device
    out: Path

    def plan(self) -> EvaluatePlan:
        train = self.recipe.train
        return EvaluatePlan(
            protocol=self.recipe.protocol,
            metric=METRIC_NAMES[self.recipe.test.metric],
            weights=[candidate.address for candidate in self.candidates],
            architectures=[candidate.architecture for candidate in self.candidates],
            train_images=len(self.train),
            test_images=len(self.test),
            classes=self.classes,
            iterations=train.iterations,
            epochs=round(train.iterations * train.batch_size / len(self.train), 2),
            device=str(self.device),
            out=str(self.out),
        )

    def fingerprint(self) -> dict[str, object]:
        """What must be the same for results to stand side by side, by recipe key or name."""
        return {
            **_measured_keys(self.recipe),
            "training images": self.train.digest,
            "test images": self.test.digest,
            "device": self.device.type,
        }


def _measured_keys(recipe: EvaluateRecipe) -> dict[str, object]:
    """Recipe keys, dotted, that what is measured depends on."""
    keys = recipe_keys(recipe.model_dump(mode="json"))
    return {key: value for key, value in keys.items() if key not in _OPERATIONAL_KEYS}


def prepare_comparison(
    recipe: EvaluateRecipe,
    weights: Sequence[str],
    data: str,
    out: Path,
    train_split: str,
    test_split: str,
    device: str,
    reporter: Reporter | None = None,
) -> Comparison:
    """Open and check weights, data and device; nothing is written.

    Raises UsageError for what cannot be used, RunError for damaged data.
    """
    reporter = reporter or SilentReporter()
    chosen = choose_device(device)
    candidates = open_candidates(weights, recipe.detector.backbone)
    train = open_labelled(data, train_split, reporter)
    test = train if test_split == train_split else open_labelled(data, test_split, reporter)
    positions = training_positions(train, recipe)
    if not positions:
        raise UsageError(f"{data}: no image of the split {train_split!r} has an object.")
    unseen = sorted(set(test.classes) - set(train.classes))
    if unseen:
        reporter.warning(
            f"{data}: {', '.join(unseen)}: in the split {test_split} only, so no detector can "
            f"learn it; its AP of 0 counts in the mean."
        )
    shared = set(train.ids) & set(test.ids)
    if shared:
        reporter.warning(
            f"{data}: {len(shared)} images, the first is {min(shared)}, are in both "
            f"{train_split} and {test_split}: AP will be of images that were trained on."
        )
    test = test.subset(range(len(test))[: recipe.data.test_images])
    if all(annotation.difficult.all() for annotation in test.annotations):
        raise UsageError(
            f"{data}: the {len(test)} images of the split {test_split!r} have no object to find "
            f"(difficult ones are not counted)."
        )
    classes = sorted({*train.classes, *test.classes})
    return Comparison(recipe, candidates, train.subset(positions), test, classes, chosen, out)


@dataclass(frozen=True)
class _Outcome:
    """What one of the weights came to, as the pictures and the table need it."""

    result: WeightsResult
    losses: list[LossRecord]
    detections: list[Detections]


def compare(comparison: Comparison, overwrite: bool, reporter: Reporter) -> Results:
    """Run every candidate that is not finished in OUT, and write the results. See `run`."""
    _claim(comparison, overwrite)
    outcomes = []
    for candidate in comparison.candidates:
        outcome = _read_finished(comparison, candidate)
        if outcome is not None:
            reporter.info(f"{candidate.address}: finished before, its result is used again.")
        else:
            outcome = _evaluate(comparison, candidate, reporter)
            _write_finished(comparison, candidate, outcome)
        outcomes.append(outcome)
    return _write_results(comparison, outcomes)


def _evaluate(comparison: Comparison, candidate: Candidate, reporter: Reporter) -> _Outcome:
    recipe, classes, device = comparison.recipe, comparison.classes, comparison.device
    name = candidate.folder
    detector = build_detector(recipe, candidate.architecture, len(classes), candidate.weights)
    detector.to(device)
    pin = device.type == "cuda"
    batches = iter(training_batches(comparison.train, recipe, classes, pin))
    started = time.perf_counter()
    losses = train_detector(detector, batches, recipe, name, reporter)
    trained = time.perf_counter()
    measure_batch_norm(detector, batches, recipe, name, reporter)
    del batches  # ends the loader's workers
    measured = time.perf_counter()
    loader = test_batches(comparison.test, recipe, classes, pin)
    detections = detect_all(detector, loader, comparison.test, name, reporter)
    tested = time.perf_counter()
    truths = [comparison.test.truth(i, classes) for i in range(len(comparison.test))]
    scores = voc_scores(truths, detections, classes, recipe.test.metric)
    images = recipe.train.iterations * recipe.train.batch_size
    result = WeightsResult(
        weights=candidate.address,
        weights_sha256=candidate.sha256,
        architecture=candidate.architecture,
        metrics=scores.metrics,
        per_class=scores.per_class,
        seconds={
            "train": trained - started,
            "precise_bn": measured - trained,
            "test": tested - measured,
        },
        extra={
            "train_images_per_second": images / (trained - started),
            "test_images_per_second": len(comparison.test) / (tested - measured),
            "final_loss": losses[-1].total,
            "folder": candidate.folder,
        },
    )
    return _Outcome(result, losses, detections)


def _claim(comparison: Comparison, overwrite: bool) -> None:
    """Make OUT the folder of this evaluation, or make sure that it is already."""
    out, claim = comparison.out, comparison.out / CLAIM_FILE
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; --out needs a directory.")
    if claim.is_file():
        if overwrite:
            _clear(out)
        else:
            _require_same_evaluation(comparison, claim)
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out}: the directory is not empty and holds no evaluation. Give another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    write_json(claim, comparison.fingerprint())


def _clear(out: Path) -> None:
    """Delete what an evaluation wrote, and nothing else; the claim goes last."""
    for result in out.glob(f"[0-9]*-*/{RESULT_FILE}"):
        result.unlink()
    for folder in out.glob("[0-9]*-*/"):
        shutil.rmtree(folder)
    for name in (RESULTS, TABLE_FILE, DETECTIONS_PICTURE, LOSSES_PICTURE, CLAIM_FILE):
        (out / name).unlink(missing_ok=True)


def _require_same_evaluation(comparison: Comparison, claim: Path) -> None:
    try:
        before = json.loads(claim.read_bytes())
    except ValueError as error:
        raise UsageError(f"{claim} is damaged ({error}). Use --overwrite to start anew.") from error
    now = comparison.fingerprint()
    changed = [
        f"  {key}: {_brief(before.get(key))} there, {_brief(value)} now"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise UsageError(
            f"{comparison.out}: an evaluation that would not compare is there:\n"
            + "\n".join(changed)
            + "\nGive the same recipe and data to continue it, another --out, or --overwrite to "
            "replace it."
        )


def _brief(value: object) -> str:
    """A value for a message; of a digest, enough to tell it from another."""
    text = str(value)
    return text if len(text) < 64 else text[:12] + "..."


def _candidate_fingerprint(comparison: Comparison, candidate: Candidate) -> dict[str, object]:
    return {
        **comparison.fingerprint(),
        "architecture": candidate.architecture,
        "weights": candidate.sha256 or RANDOM_WEIGHTS,
    }


def _read_finished(comparison: Comparison, candidate: Candidate) -> _Outcome | None:
    """A result that an earlier call wrote, or None when there is no whole one.

    Raises UsageError when the folder holds the result of other weights.
    """
    folder = comparison.out / candidate.folder
    if not (folder / RESULT_FILE).is_file():
        return None
    try:
        values = json.loads((folder / RESULT_FILE).read_bytes())
        same = values["fingerprint"] == _candidate_fingerprint(comparison, candidate)
        result = WeightsResult(**values["result"])
        losses = [LossRecord(**record) for record in values["losses"]]
        rows = json.loads((folder / DETECTIONS_FILE).read_bytes())
        detections = detections_from_rows(rows, comparison.test.ids, comparison.classes)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{folder}: the result there is damaged ({error}). Delete the folder, or use "
            f"--overwrite."
        ) from error
    if not same:
        raise UsageError(
            f"{folder}: the result there is of other weights than {candidate.address} has now. "
            f"Give another --out, or --overwrite to replace it."
        )
    return _Outcome(replace(result, weights=candidate.address), losses, detections)


def _write_finished(comparison: Comparison, candidate: Candidate, outcome: _Outcome) -> None:
    folder = comparison.out / candidate.folder
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    rows = detection_rows(outcome.detections, comparison.test.ids, comparison.classes)
    write_text(folder / DETECTIONS_FILE, rows)
    # Last: from here on these weights count as finished.
    write_json(
        folder / RESULT_FILE,
        {
            "fingerprint": _candidate_fingerprint(comparison, candidate),
            "result": asdict(outcome.result),
            "losses": [asdict(record) for record in outcome.losses],
        },
    )


def _write_results(comparison: Comparison, outcomes: Sequence[_Outcome]) -> Results:
    recipe, out = comparison.recipe, comparison.out
    results = Results(
        protocol=recipe.protocol,
        metric=METRIC_NAMES[recipe.test.metric],
        train=comparison.train.identity,
        test=comparison.test.identity,
        classes=comparison.classes,
        results=[outcome.result for outcome in outcomes],
        recipe=recipe.model_dump(mode="json"),
        recipe_sha256=recipe_digest(recipe),
        seeds=[recipe.seed],
        dupr_version=__version__,
        environment=_environment(comparison.device),
    )
    names = [candidate.folder for candidate in comparison.candidates]
    write_text(out / TABLE_FILE, table(results, names))
    draw_losses(
        out / LOSSES_PICTURE,
        {name: outcome.losses for name, outcome in zip(names, outcomes, strict=True)},
    )
    if recipe.test.pictures:
        draw_detections(
            out / DETECTIONS_PICTURE,
            comparison.test,
            comparison.classes,
            {name: outcome.detections for name, outcome in zip(names, outcomes, strict=True)},
            recipe.test.pictures,
        )
    results.write(out)
    return results


def _environment(device: torch.device) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
    }
