"""Any number of finished evaluations in one table and one plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dupr_cli.artifacts.files import atomic_file, write_json, write_text
from dupr_cli.artifacts.label_curves import LABELS_SAVED, LabelCurves
from dupr_cli.artifacts.results import Results
from dupr_cli.outside_text import one_line, plot_label
from dupr_cli.progress import Reporter
from dupr_cli.runtime.output import require_own, writing

SUMMARY, TABLE, PLOT = "summary.json", "summary.txt", "summary.png"
_WIDTH = 80


@dataclass(frozen=True)
class SummaryRow:
    """One of the weights in one evaluation. deviations: empty for a single trial."""

    results: str
    protocol: str
    weights: str
    architecture: str
    labels: int
    trials: int
    metrics: dict[str, float]
    deviations: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """rows: in comparable groups. differing: what separates the groups."""

    groups: list[list[SummaryRow]]
    metrics: list[str]


def summarise(folders: Sequence[Path], out: Path | None, reporter: Reporter) -> Summary:
    """Read results.json of each folder; with `out`, write the table and the plot there.

    Evaluations are put side by side only if their protocol, metric and test images are the same.
    Raises UsageError for a folder without results, and for an `out` that holds anything else.
    """
    groups: dict[tuple[object, ...], list[SummaryRow]] = {}
    for folder in _evaluations(folders):
        results = Results.read(folder)
        key = (results.metric, results.test.image_ids_sha256)
        groups.setdefault(key, []).extend(
            SummaryRow(
                str(folder), results.protocol, entry.weights, entry.architecture,
                results.train.images, max(1, len(entry.trials)), entry.metrics, entry.deviations,
            )
            for entry in results.results
        )  # fmt: skip
    if len(groups) > 1:
        reporter.warning(
            f"the results use {len(groups)} different metrics or sets of test images; compare "
            f"figures only within a group."
        )
    summary = Summary(list(groups.values()), [str(metric) for metric, _ in groups])
    if out is not None:
        with writing(out, "dupr evaluate report"):
            require_own(out, SUMMARY, ("groups", "metrics"), "a report")
            write_json(out / SUMMARY, {"format_version": 1, **asdict(summary)})
            write_text(out / TABLE, summary_table(summary))
            _plot(out / PLOT, summary)
    return summary


def _evaluations(folders: Sequence[Path]) -> list[Path]:
    """The folders, with those of each number of labels in place of a comparison over labels."""
    found: list[Path] = []
    for folder in folders:
        if (folder / LABELS_SAVED).is_file():
            found += [folder / name for name in LabelCurves.read(folder).folders.values()]
        else:
            found.append(folder)
    return found


def summary_table(summary: Summary) -> str:
    """Plain text of at most 80 columns, one block for each group."""
    lines: list[str] = []
    for rows, metric in zip(summary.groups, summary.metrics, strict=True):
        lines += textwrap.wrap(one_line(metric), _WIDTH)
        names = _names(rows)
        lines.append(f"{'':<3}{'labels':>7}{'seeds':>6}{names[0]:>12}" + "".join(
            f"{name:>12}" for name in names[1:]
        ))  # fmt: skip
        for number, row in enumerate(rows, 1):
            figures = "".join(f"{_figure(row, name):>12}" for name in names)
            lines.append(f"{number:<3}{row.labels:>7}{row.trials:>6}{figures}")
        lines.append("")
        for number, row in enumerate(rows, 1):
            text = f"{number}: {row.weights} ({row.architecture}), {row.protocol}, {row.results}"
            lines += textwrap.wrap(one_line(text), _WIDTH, subsequent_indent="   ")
        lines.append("")
    return "\n".join(lines)


def _names(rows: Sequence[SummaryRow]) -> list[str]:
    """The first metrics that all rows have."""
    return [name for name in rows[0].metrics if all(name in row.metrics for row in rows)][:5]


def _figure(row: SummaryRow, name: str) -> str:
    spread = f" ±{row.deviations[name]:.1f}" if name in row.deviations else ""
    return f"{row.metrics[name]:.1f}{spread}"


def _within_range(rows: Sequence[SummaryRow], name: str) -> list[list[float]]:
    """Deviations below and above the mean, of which none leaves the range of percents."""
    means = [row.metrics[name] for row in rows]
    spreads = [row.deviations.get(name, 0.0) for row in rows]
    below = [min(spread, max(0.0, mean)) for spread, mean in zip(spreads, means, strict=True)]
    above = [min(spread, max(0.0, 100 - m)) for spread, m in zip(spreads, means, strict=True)]
    return [below, above]


def _plot(path: Path, summary: Summary) -> None:
    from matplotlib.figure import Figure

    count = len(summary.groups)
    figure = Figure(
        figsize=(9, 1 + 0.5 * sum(map(len, summary.groups)) + count), layout="constrained"
    )
    axes = figure.subplots(
        count, 1, squeeze=False, height_ratios=[len(rows) + 1 for rows in summary.groups]
    )
    for axis, rows, metric in zip(axes[:, 0], summary.groups, summary.metrics, strict=True):
        name = _names(rows)[0]
        labels = [
            plot_label(f"{i}: {Path(row.weights).name}, {row.labels} labels")
            for i, row in enumerate(rows, 1)
        ]
        axis.barh(
            labels,
            [row.metrics[name] for row in rows],
            xerr=_within_range(rows, name),
            capsize=3,
        )
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel(plot_label(f"{name}: {textwrap.shorten(metric, 90)}"), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
