"""Labels saved: the same comparison with several numbers of labels, and where the curves cross.

    OUT/labels-50/ ...         an evaluation for each number of labels, see comparison.py
    OUT/labels-saved.json      curves, and the labels that each of the weights needs
    OUT/labels-saved.txt  labels-saved.csv  labels-saved.tex  labels-saved.png

How many labels a start saves is read off the curve of its mean AP, linear in the logarithm of the
number of labels, at the AP that the baseline reaches. Its interval is that of a bootstrap over
seeds: a resampled set of seeds is used for all weights and numbers, since a seed fixes the draw of
the images and the head for all of them.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.files import atomic_file, write_text
from dupr_cli.artifacts.label_curves import LABELS_SAVED, CurvePoint, LabelCurves, LabelsNeeded
from dupr_cli.artifacts.results import Results, WeightsResult
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.comparison import Comparison, compare, output_files, with_labels
from dupr_cli.evaluate.features import FEATURES_FOLDER, feature_files
from dupr_cli.evaluate.results_table import shortened
from dupr_cli.evaluate.statistics import CONFIDENCE, compared_metrics
from dupr_cli.models.compared import RANDOM_WEIGHTS
from dupr_cli.outside_text import csv_cell, latex_text, one_line, plot_label
from dupr_cli.progress import Reporter
from dupr_cli.recipe.evaluate import label_count
from dupr_cli.runtime.output import Claim, read_claim, remove
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.stopping import Limits

CLAIM_FILE = "label-curves.json"
TEXT, TABLE_CSV, TABLE_TEX, PLOT = (
    "labels-saved.txt",
    "labels-saved.csv",
    "labels-saved.tex",
    "labels-saved.png",
)
_DRAWS = 2000
_FEWEST = 3  # seeds; fewer give no interval of the labels needed
_WIDTH, _COLUMNS = 80, 5
_LEGEND = 32  # letters


def comparisons(whole: Comparison) -> dict[int, Comparison]:
    """The comparison with each number of labels, smallest first.

    Raises UsageError when two of them are the same number.
    """
    labels = whole.recipe.data.labels
    assert isinstance(labels, list)
    found: dict[int, Comparison] = {}
    for given in labels:
        count = label_count(given, len(whole.labelled))
        if count in found:
            raise UsageError(
                f"data.labels: {given} is {count} of the {len(whole.labelled)} labelled images, "
                f"like another number of the list. Leave one out. (recipe key: data.labels)"
            )
        found[count] = with_labels(whole, given, whole.out / f"labels-{count}")
    drawn = {image_id for of in found.values() for image_id in of.needed.ids}
    positions = [i for i, image_id in enumerate(whole.labelled.ids) if image_id in drawn]
    needed = whole.labelled.subset(positions)
    return {count: replace(found[count], needed=needed) for count in sorted(found)}


def claim(whole: Comparison) -> Claim:
    """The record of OUT. The numbers of labels may change later: each has its own evaluation."""
    fingerprint = {k: v for k, v in whole.fingerprint().items() if k != "data.labels"}
    folders = [of.out.name for of in comparisons(whole).values()]
    return Claim(CLAIM_FILE, "label curve", fingerprint, folders, whole.claim().defaults)


def compare_labels(
    whole: Comparison,
    world: World,
    overwrite: bool,
    reporter: Reporter,
    limits: Limits,
    leaks_in: Sequence[str],
    baseline: str | None,
) -> LabelCurves:
    """Run the comparison with every number of labels, and write what is saved. See `run`.

    baseline: address of the weights that set the mark; random weights by default, or the first.
    """
    name = baseline_name(whole, baseline)
    parts = comparisons(whole)
    if world.is_main:
        claim(whole).take(whole.out, overwrite, label_curve_files)
    world.wait()
    results = {}
    for count, comparison in parts.items():
        reporter.info(f"{count} labels:")
        if world.is_main:
            comparison.out.mkdir(exist_ok=True)
        results[count] = compare(comparison, world, False, reporter, limits, leaks_in)
        leaks_in = ()  # the test images are the same for every number
    if world.is_main:
        remove(whole.out, feature_files(whole.out / FEATURES_FOLDER))
        curves = curves_of(results, name, {n: c.out.name for n, c in parts.items()})
        _write(whole.out, curves)
    world.wait()
    return LabelCurves.read(whole.out)


def baseline_name(whole: Comparison, baseline: str | None) -> str:
    """Folder name of the baseline's weights. Raises UsageError if they are not compared."""
    wanted = baseline or RANDOM_WEIGHTS
    for compared in whole.weights:
        if compared.address == wanted:
            return compared.folder
    if baseline is not None:
        raise UsageError(
            f"--baseline {baseline}: it is not among the compared weights: "
            f"{', '.join(c.address for c in whole.weights)}."
        )
    return whole.weights[0].folder


def label_curve_files(out: Path) -> Iterator[Path]:
    """The files of a label curve by its own record, which comes last."""
    if not (out / CLAIM_FILE).exists():
        return
    try:
        _, folders = read_claim(out / CLAIM_FILE)
    except UsageError:  # damaged: parts are recognised by their folder names
        folders = [path.name for path in out.glob("labels-*") if path.is_dir()]
    for name in folders:
        yield from output_files(out / name)
    yield from feature_files(out / FEATURES_FOLDER)
    yield from (out / n for n in (LABELS_SAVED, TEXT, TABLE_CSV, TABLE_TEX, PLOT, CLAIM_FILE))


def curves_of(
    results: Mapping[int, Results], baseline: str, folders: Mapping[int, str]
) -> LabelCurves:
    """Curves and labels saved from the results of each number of labels.

    baseline: folder name of its weights.
    """
    first = next(iter(results.values()))
    metrics = curve_metrics(first.results[0])
    names = {str(entry.extra["folder"]): entry.weights for entry in first.results}
    curves = {
        metric: {
            name: [_curve_point(count, of.results[i], metric) for count, of in results.items()]
            for i, name in enumerate(names)
        }
        for metric in metrics
    }
    return LabelCurves(
        protocol=first.protocol,
        metric=first.metric,
        baseline=baseline,
        confidence=CONFIDENCE,
        weights=names,
        curves=curves,
        saved={metric: labels_needed(curves[metric], baseline) for metric in metrics},
        folders=dict(folders),
        test_images=first.test.images,
        seeds=first.seeds,
        notes=[note for of in results.values() for note in of.notes],
    )


def curve_metrics(entry: WeightsResult) -> tuple[str, str]:
    """The metrics that curves are drawn of; the first decides."""
    return compared_metrics(entry.metrics)[:2]


def _curve_point(labels: int, entry: WeightsResult, metric: str) -> CurvePoint:
    values = {trial.seed: trial.metrics[metric] for trial in entry.trials}
    mean, reach = entry.metrics[metric], 0.0
    if len(values) > 1:
        from scipy.stats import t  # half a second to import

        spread = entry.deviations[metric] / math.sqrt(len(values))
        reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread
    return CurvePoint(labels, mean, mean - reach, mean + reach, values)


def labels_needed(curves: Mapping[str, Sequence[CurvePoint]], baseline: str) -> list[LabelsNeeded]:
    """For each of the weights but the baseline, the labels needed for the baseline's means.

    curves: of one metric, by name of the weights, with the same labels and seeds.
    """
    counts = [point.labels for point in curves[baseline]]
    seeds = sorted(curves[baseline][0].values)
    # (number of labels, seeds)
    tables = {
        name: np.array([[point.values[seed] for seed in seeds] for point in points])
        for name, points in curves.items()
    }
    random = np.random.default_rng(0)
    samples = random.integers(len(seeds), size=(_DRAWS, len(seeds)))
    widening = _widening(len(seeds))

    def resampled(name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        means = tables[name].mean(1)
        drawn: NDArray[np.float64] = means + widening * (tables[name][:, rows].mean(1) - means)
        return drawn

    found = []
    for name, table in tables.items():
        if name == baseline:
            continue
        draws = [(resampled(name, rows), resampled(baseline, rows)) for rows in samples]
        for i, count in enumerate(counts):
            target = float(tables[baseline][i].mean())
            needed = crossing(counts, table.mean(1), target)
            crossings = [crossing(counts, curve, float(base[i])) for curve, base in draws]
            low, high = np.quantile(
                crossings, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest"
            )
            few = len(seeds) < _FEWEST
            beyond = "less" if needed == 0 else "more" if needed == math.inf else ""
            found.append(
                LabelsNeeded(
                    weights=name,
                    baseline_labels=count,
                    target=target,
                    needed=None if beyond else needed,
                    beyond=beyond,
                    low=None if few or not 0 < low < math.inf else float(low),
                    high=None if few or not 0 < high < math.inf else float(high),
                )
            )
    return found


def _widening(seeds: int) -> float:
    """What the deviations of a bootstrap over few seeds are multiplied with, so that the interval
    of a mean is Student's; without it, intervals over 3 seeds covered the truth 78 % of the time.
    """
    from scipy.stats import norm, t  # half a second to import

    if seeds < 2:
        return 0.0
    level = (1 + CONFIDENCE) / 2
    return math.sqrt(seeds / (seeds - 1)) * float(t.ppf(level, seeds - 1) / norm.ppf(level))


def crossing(counts: Sequence[int], means: NDArray[np.float64], target: float) -> float:
    """The number of labels at which a curve first reaches `target`, linear in log(labels).

    0 if its first point is above the target already; infinite if it never gets there.
    """
    if means[0] >= target:
        return float(counts[0]) if means[0] == target else 0.0
    for i in range(1, len(counts)):
        if means[i] >= target:
            share = (target - means[i - 1]) / (means[i] - means[i - 1])
            low, high = math.log(counts[i - 1]), math.log(counts[i])
            return math.exp(low + share * (high - low))
    return math.inf


def _write(out: Path, curves: LabelCurves) -> None:
    write_text(out / TEXT, text(curves))
    write_text(out / TABLE_CSV, table_csv(curves))
    write_text(out / TABLE_TEX, table_tex(curves))
    draw(out / PLOT, curves)
    curves.write(out)


def text(curves: LabelCurves) -> str:
    """Plain text of at most 80 columns: a table for each metric, then the labels needed."""
    lines = textwrap.wrap(one_line(f"{curves.protocol}: {curves.metric}"), _WIDTH)
    lines.append(f"{len(curves.seeds)} seeds, {curves.test_images} images tested")
    for note in dict.fromkeys(curves.notes):
        lines += textwrap.wrap(one_line(f"Note: {note}"), _WIDTH, subsequent_indent="  ")
    for metric, of_weights in curves.curves.items():
        for first in range(0, len(of_weights[curves.baseline]), _COLUMNS):
            some = slice(first, first + _COLUMNS)
            heads = [point.labels for point in of_weights[curves.baseline][some]]
            lines += ["", f"{metric + ' with labels:':<22}" + "".join(f"{c:>11}" for c in heads)]
            for name, points in of_weights.items():
                cells = "".join(f"{figure_of(point):>11}" for point in points[some])
                lines.append(f"{shortened(name, 21):<22}{cells}")
    percent = round(100 * curves.confidence)
    lines += (
        ["", f"± and brackets: {percent} % intervals over seeds"] if len(curves.seeds) > 1 else []
    )
    for metric, rows in curves.saved.items():
        lines += (
            ["", one_line(f"Labels needed for the {metric} of {curves.baseline}")] if rows else []
        )
        for row in rows:
            name = shortened(row.weights, 24)
            lines.append(
                f"  {name:<25}{row.described(curves):>22} in place of {row.baseline_labels} "
                f"({metric} {row.target:.1f})"
            )
    lines.append("")
    for name, address in curves.weights.items():
        lines += textwrap.wrap(one_line(f"{name}: {address}"), _WIDTH, subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def figure_of(point: CurvePoint) -> str:
    """The mean of a point, with half its interval if there are several seeds: 12.7 ±2.8."""
    reach = f" ±{point.high - point.mean:.1f}" if len(point.values) > 1 else ""
    return f"{point.mean:.1f}{reach}"


def table_csv(curves: LabelCurves) -> str:
    """One row per metric, weights and number of labels."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["metric", "weights", "labels", "mean", "low", "high", "seeds", "needed_for_it",
                   "needed_low", "needed_high"])  # fmt: skip
    for metric, of_weights in curves.curves.items():
        needed = {(row.weights, row.baseline_labels): row for row in curves.saved[metric]}
        for name, points in of_weights.items():
            for point in points:
                row = needed.get((name, point.labels))
                cells = ["", "", ""]
                if row is not None:
                    of_row = (row.needed, row.low, row.high)
                    cells = ["" if v is None else f"{v:.1f}" for v in of_row]
                    cells[0] = cells[0] or row.beyond
                figures = [f"{v:.3f}" for v in (point.mean, point.low, point.high)]
                rows.writerow(
                    [metric, csv_cell(name), point.labels, *figures, len(point.values), *cells]
                )
    return file.getvalue()


def table_tex(curves: LabelCurves) -> str:
    """A LaTeX table (booktabs) of each metric by number of labels."""
    first = next(iter(curves.curves.values()))
    counts = [point.labels for point in first[curves.baseline]]
    lines = [
        f"% {one_line(curves.protocol)}: {one_line(curves.metric)}; {len(curves.seeds)} seeds",
        f"\\begin{{tabular}}{{ll{'r' * len(counts)}}}",
        "\\toprule",
        f"Metric & Weights & {' & '.join(map(str, counts))} \\\\",
    ]
    for metric, of_weights in curves.curves.items():
        lines.append("\\midrule")
        for name, points in of_weights.items():
            figures = (figure_of(point).replace("±", "\\pm ") for point in points)
            cells = " & ".join(f"${figure}$" for figure in figures)
            lines.append(f"{metric} & {latex_text(name)} & {cells} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def legend_titles(weights: Mapping[str, str]) -> dict[str, str]:
    """What a legend calls the weights, by name: the end of the address, if that is enough.

    weights: address of each name.
    """
    ends = {
        name: "random weights" if address == RANDOM_WEIGHTS else Path(address).name or address
        for name, address in weights.items()
    }
    counts = Counter(ends.values())
    titles = {name: end if counts[end] == 1 else name for name, end in ends.items()}
    return {name: shortened(title, _LEGEND) for name, title in titles.items()}


def draw(path: Path, curves: LabelCurves) -> None:
    """A PNG: each metric against the number of labels, with the labels saved as arrows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(curves.curves), squeeze=False)[0]
    titles = legend_titles(curves.weights)
    arrows = False
    for axis, (metric, of_weights) in zip(axes, curves.curves.items(), strict=True):
        counts = [point.labels for point in of_weights[curves.baseline]]
        for number, (name, points) in enumerate(of_weights.items()):
            colour = f"C{number}"
            means = [point.mean for point in points]
            # A point on the axis is drawn whole.
            axis.plot(
                counts, means, "o-", color=colour, label=plot_label(titles[name]), linewidth=2,
                clip_on=False,
            )  # fmt: skip
            lows, highs = zip(*(point.band for point in points), strict=True)
            axis.fill_between(counts, lows, highs, color=colour, alpha=0.15)
        for row in curves.saved[metric]:
            saves = row.high is not None and row.high < row.baseline_labels
            if row.needed is not None and saves:
                arrows = True
                number = list(of_weights).index(row.weights)
                axis.annotate(
                    "", (row.needed, row.target), (row.baseline_labels, row.target),
                    arrowprops={"arrowstyle": "->", "color": f"C{number}", "linestyle": ":"},
                )  # fmt: skip
                share = 1 - row.needed / row.baseline_labels
                # At the point, because arrows of several weights may lie on one another.
                axis.annotate(
                    f"{share:.0%} fewer", (row.needed, row.target), (8, -4), va="top",
                    textcoords="offset points", fontsize=9, color=f"C{number}",
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("labelled images")
        axis.set_ylabel(metric)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    percent = round(100 * curves.confidence)
    figure.suptitle(
        f"{plot_label(curves.protocol)}, {len(curves.seeds)} seeds; bands: {percent} % intervals"
        + ("; arrows: labels that reach the same figure" if arrows else ""),
        fontsize=10,
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
