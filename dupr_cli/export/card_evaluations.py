"""Evaluations on the model card: which are of these weights, their tables, and the Hub's index.

An evaluation is recognised by the sha256 of the weights in it, whatever their address was. Random
weights that were compared stand in the same table, because an AP alone says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from dupr_cli import __version__
from dupr_cli.artifacts.files import leads_outside
from dupr_cli.artifacts.label_curves import LABELS_SAVED, CurvePoint, LabelCurves
from dupr_cli.artifacts.results import RESULTS, DatasetIdentity, Results, WeightsResult
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import UsageError
from dupr_cli.export.types import ExportResult
from dupr_cli.models.compared import RANDOM_WEIGHTS
from dupr_cli.outside_text import markdown_text, one_line

# Indexed by the Hub, in this order; other metrics are only shown.
_METRICS = ("AP", "AP50", "AP75", "segm_AP", "keypoint_AP", "mIoU")
_MOST_COLUMNS = 3  # metrics of a table that has none of these


@dataclass(frozen=True)
class Evaluation:
    """own: the entry of the exported weights in `results`."""

    own: WeightsResult
    results: Results

    @property
    def metrics(self) -> list[str]:
        known = [name for name in _METRICS if name in self.own.metrics]
        return known or [*self.own.metrics][:_MOST_COLUMNS]


@dataclass(frozen=True)
class Curve:
    """A comparison over numbers of labels. folder: where it was found. parts: its evaluations."""

    folder: Path
    curves: LabelCurves
    parts: list[Evaluation]


@dataclass(frozen=True)
class Evaluations:
    """What is known of some weights. single: with one number of labels."""

    single: list[Evaluation]
    curves: list[Curve]

    @property
    def all(self) -> list[Evaluation]:
        return [*self.single, *(part for curve in self.curves for part in curve.parts)]


def find_evaluations(weights: Weights, result: ExportResult, given: Sequence[Path]) -> Evaluations:
    """Evaluations of these weights: given ones, and those in or next to the run or file.

    given: folders of evaluations, or of comparisons over numbers of labels. Raises UsageError for
    any other folder, and for evaluations of other weights.
    """
    digests = {weights.sha256, *(d for f in result.formats for d in f.files.values())}
    origin = Path(weights.address)
    near: list[Path] = []
    if origin.exists():
        near = sorted(
            path.parent
            for name in (LABELS_SAVED, RESULTS)
            for place in (origin, origin.parent)
            for path in place.glob(f"*/{name}")
        )
    singles: dict[Path, Evaluation] = {}
    curves: dict[Path, Curve] = {}
    for folder in [*given, *near]:
        place = folder.resolve()
        try:
            if (folder / LABELS_SAVED).is_file():
                found = _curve(folder, digests)
                if found.parts:
                    curves.setdefault(place, found)
                    continue
            elif single := _evaluation(folder, digests):
                singles.setdefault(place, single)
                continue
        except UsageError:
            if folder in given:
                raise
            continue  # a results.json of another program
        if folder in given:
            raise UsageError(f"{folder}: this is not an evaluation of {weights.address}.")
    return Evaluations([*singles.values()], [*curves.values()])


def _evaluation(folder: Path, digests: set[str]) -> Evaluation | None:
    results = Results.read(folder / RESULTS)
    own = [entry for entry in results.results if entry.weights_sha256 in digests]
    return Evaluation(own[0], results) if own else None


def _curve(folder: Path, digests: set[str]) -> Curve:
    curves = LabelCurves.read(folder)
    for within in curves.folders.values():
        if leads_outside(within):
            raise UsageError(f"{folder / LABELS_SAVED}: {within} is not in its folder.")
    parts = [_evaluation(folder / within, digests) for _, within in sorted(curves.folders.items())]
    return Curve(folder, curves, [part for part in parts if part is not None])


def index_of(evaluations: Evaluations) -> list[EvalResult]:
    """The evaluations as the Hub indexes them, without those that left out test images."""
    return [entry for each in evaluations.all for entry in _indexed(each)]


def _indexed(evaluation: Evaluation) -> Iterator[EvalResult]:
    own, results = evaluation.own, evaluation.results
    if _is_trial(results):
        return
    name = _name(results.test)
    random = next((entry for entry in results.results if _is_random(entry)), None)
    for metric in _METRICS:
        if metric not in own.metrics:
            continue
        arguments: dict[str, object] = {"seeds": len(results.seeds)}
        if metric in own.deviations:
            arguments["standard_deviation"] = round(own.deviations[metric], 3)
        if random is not None and metric in random.metrics:
            arguments["random_weights"] = round(random.metrics[metric], 3)
        yield EvalResult(
            task_type="image-segmentation" if metric == "mIoU" else "object-detection",
            dataset_type=name,
            dataset_name=one_line(f"{name}, {results.test.images:,} images"),
            # Results are grouped by this, so that each number of labels stays by itself.
            dataset_config=one_line(f"{results.protocol}, {results.train.images} labelled images"),
            dataset_split=one_line(results.test.split),
            dataset_args={"image_ids_sha256": one_line(results.test.image_ids_sha256)},
            metric_type=metric,
            metric_name=metric,
            metric_value=round(own.metrics[metric], 3),
            metric_args=arguments,
        )


def _is_trial(results: Results) -> bool:
    """Whether --limit left out test images: its AP is reported with a note but not indexed."""
    data = results.recipe.get("data")
    return isinstance(data, dict) and data.get("test_images") is not None


def _name(used: DatasetIdentity) -> str:
    """The folder's name: a path means nothing elsewhere, and may reveal too much."""
    return one_line(Path(used.address).name or used.address)


def _is_random(entry: WeightsResult) -> bool:
    return entry.weights_sha256 is None and entry.weights == RANDOM_WEIGHTS


def tables_of(evaluations: Evaluations) -> list[str]:
    """The section of the card, as paragraphs; empty without evaluations."""
    if not evaluations.all:
        return []
    parts = ["## Evaluation"]
    for curve in evaluations.curves:
        parts += _curve_tables(curve)
    for each in evaluations.single:
        parts += _table(each)
    return [*parts, f"Measured with dupr {__version__}; every number is in `results/`."]


def _curve_tables(curve: Curve) -> list[str]:
    curves, first = curve.curves, curve.parts[0]
    own, results = str(first.own.extra.get("folder", "")), first.results
    metric, of_weights = next(iter(curves.curves.items()))
    counts = [str(point.labels) for point in next(iter(of_weights.values()))]
    rows = [f"| {metric} with labelled images | {' | '.join(counts)} |",
            f"|---|{'---|' * len(counts)}"]  # fmt: skip
    for name, points in of_weights.items():
        address = curves.weights.get(name, name)
        title = "**this**" if name == own else _title(address)
        rows.append(f"| {title} | {' | '.join(map(_with_interval, points))} |")
    text = (
        f"{_protocol(results)}. {_training(results)}, tested on {curves.test_images:,} images of "
        f"{markdown_text(_name(results.test))}, {_seeds(len(curves.seeds))}"
    )
    if len(curves.seeds) > 1:
        text += f", with {100 * curves.confidence:.0f} % intervals"
    return [f"{text}.\n\n" + "\n".join(rows), *_notes(first, curves.notes)]


def _with_interval(point: CurvePoint) -> str:
    if len(point.values) < 2:
        return f"{point.mean:.1f}"
    return f"{point.mean:.1f} ± {point.high - point.mean:.1f}"


def _table(evaluation: Evaluation) -> list[str]:
    results, names = evaluation.results, evaluation.metrics
    heads = " | ".join(markdown_text(name) for name in names)
    rows = [f"| weights | {heads} |", f"|---|{'---|' * len(names)}"]
    for entry in results.results:
        title = "**this**" if entry is evaluation.own else _title(entry.weights)
        rows.append(f"| {title} | {' | '.join(_figure(entry, name) for name in names)} |")
    text = (
        f"{_protocol(results)}. {_training(results)} with {results.train.images:,} images, tested "
        f"on {results.test.images:,} images of {markdown_text(_name(results.test))}, "
        f"{_seeds(len(results.seeds))}.\n\n" + "\n".join(rows)
    )
    return [text, *_notes(evaluation, results.notes)]


def _protocol(results: Results) -> str:
    return markdown_text(f"{results.protocol}: {results.metric}")


def _training(results: Results) -> str:
    detector = results.recipe.get("detector")
    # Probes have no detector, and only use features.
    tuned = isinstance(detector, dict) and detector.get("frozen") != "res5"
    return "Fine-tuned" if tuned else "Trained on features of the frozen backbone"


def _title(address: str) -> str:
    return "random weights" if address == RANDOM_WEIGHTS else markdown_text(Path(address).name)


def _notes(evaluation: Evaluation, notes: Sequence[str]) -> list[str]:
    changes = (
        f"{key} is {now}, not {was}" for key, (was, now) in evaluation.results.changes.items()
    )
    lines = [f"- {markdown_text(note)}" for note in dict.fromkeys([*notes, *changes])]
    return ["\n".join(lines)] if lines else []


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _figure(entry: WeightsResult, name: str) -> str:
    spread = f" ± {entry.deviations[name]:.1f}" if name in entry.deviations else ""
    return f"{entry.metrics[name]:.1f}{spread}" if name in entry.metrics else ""
