"""The report of a study: tables and curves of every protocol, differences, retrieval.

Each evaluation holds one start. Here the starts of one kind are joined: the trials of several
pre-training runs are averaged for each seed of the evaluation, which keeps seeds paired between
starts. Intervals are therefore over seeds of the evaluation (the head, and the draw of the labels
if it varies); how much pre-training runs differ is shown beside them. The report depends only on
results, so that it is the same however often the study was interrupted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from dupr_cli.artifacts.files import write_json, write_text
from dupr_cli.artifacts.label_curves import LABELS_SAVED, LabelCurves
from dupr_cli.artifacts.results import PairedDifference, Results, TrialResult, WeightsResult
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import UsageError
from dupr_cli.evaluate import label_curves
from dupr_cli.evaluate.statistics import holm, p_value, paired_difference, summed_up
from dupr_cli.outside_text import csv_cell, markdown_text, several_lines
from dupr_cli.parsing import ParseError, read_limited, validated
from dupr_cli.recipe import EvaluateRecipe
from dupr_cli.recipe.study import StudyRecipe
from dupr_cli.study.cells import EVALUATE, PRETRAIN, Start, all_cells, evaluate_recipe, starts

FORMAT_VERSION = 1
REPORT = "report"


@dataclass(frozen=True)
class ProtocolReport:
    """One protocol of the study.

    decides: the metric that was named beforehand. curves: of all kinds of starts, each the mean
    over its pre-training runs. differences: from the baseline, by number of labels; those of
    `decides` carry p-values corrected for their number. runs: the metric that decides of each
    pre-training run, by kind and number of labels.
    """

    name: str
    decides: str
    curves: LabelCurves
    differences: dict[int, list[PairedDifference]]
    runs: dict[str, dict[int, dict[int, float]]]
    figure: str


@dataclass(frozen=True)
class StudyReport:
    """report.json. retrieval: final held-out patch retrieval of each run, percent by level."""

    name: str
    description: str
    baseline: str
    protocols: list[ProtocolReport]
    retrieval: dict[str, dict[str, float]]
    out: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> StudyReport:
        """Read the report of a study from its OUT. Raises UsageError when there is none."""
        file = folder / f"{REPORT}.json"
        try:
            return validated(cls, parse_record(read_limited(file), FORMAT_VERSION, file))
        except (OSError, ParseError) as error:
            raise UsageError(
                f"{file}: not the report of a study ({error}). `dupr study` writes one when all "
                f"cells are finished; the same command continues an unfinished study."
            ) from error


def missing_cells(recipe: StudyRecipe, out: Path) -> list[str]:
    """Names of the cells that are not finished."""
    return [cell.name for cell in all_cells(recipe, out) if not cell.is_finished]


def write_report(recipe: StudyRecipe, out: Path) -> StudyReport:
    """Read the results of all cells, and write the report into OUT."""
    protocols = _corrected([_of_protocol(recipe, out, name) for name in recipe.protocols])
    retrieval = {
        start.name: MetricsLog(out / PRETRAIN / start.name).retrieval()[-1]
        for start in starts(recipe, out)
        if start.kind in recipe.methods
    }
    report = StudyReport(
        recipe.name, recipe.description, recipe.baseline, protocols, retrieval, str(out)
    )
    for protocol in protocols:
        label_curves.draw(out / protocol.figure, protocol.curves)
    write_text(out / f"{REPORT}.md", markdown(report))
    write_text(out / f"{REPORT}.csv", table_csv(report))
    write_text(
        out / f"{REPORT}.tex", "\n".join(label_curves.table_tex(p.curves) for p in protocols)
    )
    write_json(out / f"{REPORT}.json", asdict(replace(report, out="")))
    return report


def _of_protocol(recipe: StudyRecipe, out: Path, protocol: str) -> ProtocolReport:
    settings = evaluate_recipe(recipe, protocol)
    of_kinds: dict[str, dict[int | None, dict[int, Results]]] = {}
    for start in starts(recipe, out):
        found = _results(out, protocol, start, settings)
        of_kinds.setdefault(start.kind, {})[start.seed] = found
    counts = list(next(iter(next(iter(of_kinds.values())).values())))
    kinds = list(of_kinds)
    joined = {
        count: replace(
            next(iter(of_kinds[kinds[0]].values()))[count],
            results=[
                _joined(kind, [of[count] for of in of_kinds[kind].values()]) for kind in kinds
            ],
            notes=[],
        )
        for count in counts
    }
    decides = recipe.protocols[protocol].metric
    curves = label_curves.curves_of(joined, recipe.baseline, {})
    differences = {
        count: _differences(results.results, kinds, recipe.baseline)
        for count, results in joined.items()
    }
    runs = {
        kind: {
            count: {
                seed: of[count].results[0].metrics[decides]
                for seed, of in of_kinds[kind].items()
                if seed is not None
            }
            for count in counts
        }
        for kind in kinds
    }
    return ProtocolReport(protocol, decides, curves, differences, runs, f"{protocol}.png")


def _results(
    out: Path, protocol: str, start: Start, settings: EvaluateRecipe
) -> dict[int, Results]:
    """The results of a start by number of labels."""
    folder = out / EVALUATE / protocol / start.name
    if not isinstance(settings.data.labels, list):
        results = Results.read(folder)
        return {results.train.images: results}
    curves = LabelCurves.read(folder / LABELS_SAVED)
    return {count: Results.read(folder / name) for count, name in curves.folders.items()}


def _joined(kind: str, of_runs: Sequence[Results]) -> WeightsResult:
    """The mean over pre-training runs, seed by seed, as the result of one start."""
    entries = [results.results[0] for results in of_runs]
    by_seed: dict[int, list[TrialResult]] = {}
    for entry in entries:
        for trial in entry.trials:
            by_seed.setdefault(trial.seed, []).append(trial)
    trials = [
        replace(of[0], metrics={m: fmean(t.metrics[m] for t in of) for m in of[0].metrics})
        for of in by_seed.values()
    ]
    return summed_up(kind, None, entries[0].architecture, kind, trials)


def _differences(
    results: Sequence[WeightsResult], kinds: Sequence[str], baseline: str
) -> list[PairedDifference]:
    base = results[kinds.index(baseline)]
    found = [
        paired_difference(entry, base, metric, (kind, baseline))
        for kind, entry in zip(kinds, results, strict=True)
        if kind != baseline
        for metric in label_curves.curve_metrics(entry)
    ]
    return [difference for difference in found if difference is not None]


def _corrected(protocols: Sequence[ProtocolReport]) -> list[ProtocolReport]:
    """The p-values of the metrics that decide, corrected for all comparisons of the study."""
    places = [
        (number, count, i)
        for number, protocol in enumerate(protocols)
        for count, of in protocol.differences.items()
        for i, difference in enumerate(of)
        if difference.metric == protocol.decides
    ]
    values = [p_value(protocols[number].differences[count][i]) for number, count, i in places]
    found = [{count: list(of) for count, of in p.differences.items()} for p in protocols]
    for (number, count, i), value in zip(places, holm(values), strict=True):
        found[number][count][i] = replace(found[number][count][i], adjusted_p=value)
    return [replace(p, differences=of) for p, of in zip(protocols, found, strict=True)]


def markdown(report: StudyReport) -> str:
    """The report for people."""
    lines = [f"# {markdown_text(report.name) or 'Study'}", ""]
    # The description is Markdown of the recipe's author.
    lines += [several_lines(report.description), ""] if report.description else []
    for protocol in report.protocols:
        lines += _protocol_lines(protocol, report.baseline)
    if report.retrieval:
        levels = sorted({level for of in report.retrieval.values() for level in of})
        lines += ["## Held-out patch retrieval", "", "Top-1 at the end of each run, percent.", ""]
        lines += _table(
            ["run", *levels],
            [
                [name, *(f"{of[v]:.1f}" if v in of else "" for v in levels)]
                for name, of in report.retrieval.items()
            ],
        )
    return "\n".join(lines).rstrip() + "\n"


def _protocol_lines(protocol: ProtocolReport, baseline: str) -> list[str]:
    curves = protocol.curves
    counts = [point.labels for point in next(iter(next(iter(curves.curves.values())).values()))]
    percent = round(100 * curves.confidence)
    lines = [
        f"## {markdown_text(protocol.name)}",
        "",
        f"{markdown_text(f'{curves.protocol}: {curves.metric}')}. {len(curves.seeds)} seeds, "
        f"{curves.test_images} images tested. Means and {percent} % intervals over seeds of the "
        f"evaluation, in which neither the chance of pre-training nor that of the random backbone "
        f"is. {protocol.decides} decides.",
        "",
    ]
    for metric, of_kinds in curves.curves.items():
        rows = [
            [kind, *(label_curves.figure_of(point) for point in points)]
            for kind, points in of_kinds.items()
        ]
        lines += _table([f"{metric} with labels", *map(str, counts)], rows)
    rows = [
        [f"{d.first} - {d.second}", str(count), d.metric, f"{d.mean:+z.1f}",
         f"[{d.low:+z.1f}, {d.high:+z.1f}]", _verdict(d)]
        for count, of in protocol.differences.items() for d in of
    ]  # fmt: skip
    if rows:
        lines += [
            f"Differences from {markdown_text(baseline)}, paired by seed; verdicts are corrected "
            f"for all comparisons of the study (Holm):",
            "",
        ]
        lines += _table(["difference", "labels", "metric", "mean", "interval", "verdict"], rows)
    saved = [
        [row.weights, metric, str(row.baseline_labels), f"{row.target:.1f}",
         row.described(curves)]
        for metric, of in curves.saved.items() for row in of
    ]  # fmt: skip
    if saved and len(counts) > 1:
        lines += [f"Labels needed for what {markdown_text(baseline)} reaches:", ""]
        lines += _table(
            ["start", "metric", f"labels of {baseline}", "its figure", "labels needed"], saved
        )
    spread = [
        [kind, str(count), " / ".join(f"{v:.1f}" for v in of.values()), f"{stdev(of.values()):.1f}"]
        for kind, by_count in protocol.runs.items()
        for count, of in by_count.items()
        if len(of) > 1
    ]
    if spread:
        lines += [f"Each pre-training run by itself, {protocol.decides}:", ""]
        lines += _table(["start", "labels", "runs", "standard deviation"], spread)
    return [*lines, f"![{markdown_text(protocol.name)}]({protocol.figure})", ""]


def _verdict(found: PairedDifference) -> str:
    if found.adjusted_p is None:
        return ""
    return "real" if found.is_real else "may be chance"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a name and of what dupr itself wrote, such as figures, which needs no escapes."""
    lines = [_row([*map(markdown_text, head)]), f"|{'---|' * len(head)}"]
    return [*lines, *(_row([markdown_text(name), *figures]) for name, *figures in rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_csv(report: StudyReport) -> str:
    """One row per protocol, metric, start and number of labels."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    for number, protocol in enumerate(report.protocols):
        of_protocol = list(csv.reader(io.StringIO(label_curves.table_csv(protocol.curves))))
        if number == 0:
            rows.writerow(["protocol", *of_protocol[0]])
        rows.writerows([csv_cell(protocol.name), *row] for row in of_protocol[1:])
    return file.getvalue()
