"""The figures of a report: SVG whose colours follow the page, light or dark.

Each panel is a picture of its own, so that the page can lay them out for any width. Text stays
text. Colours are names of the page's style (--c0, --c1, ... and the colour of its text); matplotlib
draws with stand-ins, which are replaced in the SVG.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import PairedDifference
from dupr_cli.outside_text import plot_label
from dupr_cli.report.sources import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = 7  # colours of the page's style, --c0 and on
_INK = "#010203"  # stands for the colour of the page's text
_SIZE = (4.3, 2.9)  # inches
_MOST_POINTS = 250  # of a curve
_FEW_POINTS = 15  # curves with at most this many points get markers

Points = list[tuple[float, float]]


def colour(number: int) -> str:
    """The stand-in of the page's colour of this number."""
    return f"#0102{0x10 + number % PALETTE:02x}"


@dataclass(frozen=True)
class Figure:
    """A panel. title: above it. note: below it. svg: safe to put into the page."""

    title: str
    note: str
    svg: Markup


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most `most` points: means of neighbouring ones, between the first and the last."""
    if len(points) <= most:
        return points
    inner = np.array_split(np.asarray(points[1:-1]), most - 2)
    means = [tuple(part.mean(0).tolist()) for part in inner]
    return [points[0], *((step, value) for step, value in means), points[-1]]


def run_figures(runs: Sequence[Run]) -> list[Figure]:
    """The curves of all runs over one another: retrieval, losses, then health and speed."""
    runs = [run for run in runs if run.lines]
    if not runs:
        return []
    names = sorted({name for run in runs for line in run.lines for name in line})
    levels = [name.removeprefix("retrieval/") for name in names if name.startswith("retrieval/")]
    losses = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    figures = [_retrieval(runs, level) for level in levels]
    figures += [_loss(runs, place) for place in losses]
    others = [
        _simple(runs, "Spread of embeddings, lowest", _lowest_spread, "1 is healthy, 0 collapsed"),
        _simple(runs, "Speed", lambda run: run.points("images_per_second"), "images/s"),
        _simple(runs, "Waiting for data", _data_wait, "% of the time"),
        _simple(runs, "Learning rate", lambda run: run.points("lr"), "learning rate"),
    ]
    return figures + [figure for figure in others if figure is not None]


def _retrieval(runs: Sequence[Run], level: str) -> Figure:
    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            _line(axes, run, number, _percent(run.points(f"retrieval/{level}")))
            for case, style in (("same", "--"), ("opposite", ":")):
                points = _percent(run.points(f"retrieval_{case}_flip/{level}"))
                _line(axes, run, number, points, style, 1.1, named=False)
        axes.set_ylabel("found, % of the patches")
        axes.set_ylim(bottom=0)

    return Figure(
        f"Held-out patch retrieval, {level}",
        "Solid: all pairs. Dashed: both views mirrored alike. Dotted: one of them mirrored. Step 0 "
        "is the untrained network.",
        _svg(draw),
    )


def _loss(runs: Sequence[Run], place: str) -> Figure:
    def draw(axes: Axes) -> None:
        references: dict[float, int] = {}
        filled = 0.0
        for number, run in enumerate(runs):
            _line(axes, run, number, run.points(f"loss/{place}"))
            reference = run.last(f"reference/{place}")
            if reference is not None:
                references.setdefault(reference, number)
            filled = max(filled, filling(run, place))
        for value in references:
            axes.axhline(value, color=_INK, alpha=0.6, linestyle="--", linewidth=1)
            axes.annotate(
                f"ln(1 + {math.exp(value) - 1:,.0f})", (1, value), (-2, 2),
                xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=9, color=_INK,
            )  # fmt: skip
        if filled:
            axes.axvspan(0, filled, color=_INK, alpha=0.08, linewidth=0)
        axes.set_ylabel("loss, nats, not weighted")

    kind, _, level = place.partition("/")
    return Figure(
        f"{kind.capitalize()} loss, {level}" if level else f"{kind.capitalize()} loss",
        "Dashed: ln(1 + K), the loss of guessing. Shaded: the queue is filling.",
        _svg(draw),
    )


def filling(run: Run, place: str) -> float:
    """The step at which the queue of kind/level was full; 0 if that is not known."""
    points = run.points(f"queue_fill/{place}")
    full = [step for step, fill in points if fill >= 1]
    return full[0] if full else points[-1][0] if points else 0.0


def _simple(
    runs: Sequence[Run], title: str, points_of: Callable[[Run], Points], label: str
) -> Figure | None:
    if not any(points_of(run) for run in runs):
        return None

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            _line(axes, run, number, points_of(run))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)

    return Figure(title, "", _svg(draw))


def _lowest_spread(run: Run) -> Points:
    found = []
    for line in run.lines:
        values = [value for name, value in line.items() if name.startswith("spread/")]
        if values:
            found.append((line["step"], min(values)))
    return found


def _data_wait(run: Run) -> Points:
    return _percent(run.points("data_wait"))


def _percent(points: Points) -> Points:
    return [(step, 100 * value) for step, value in points]


def label_figures(curves: LabelCurves) -> list[Figure]:
    """Each metric against the number of labels, with bands of the intervals."""
    return [_of_labels(curves, metric) for metric in curves.curves]


def _of_labels(curves: LabelCurves, metric: str) -> Figure:
    def draw(axes: Axes) -> None:
        counts: list[int] = []
        for number, every in enumerate(curves.curves[metric].values()):
            points = [p for p in every if p.labels > 0 and 0 <= p.mean <= 100]
            if not points:
                continue
            counts = [point.labels for point in points]
            means = [point.mean for point in points]
            shade = colour(number)
            axes.plot(counts, means, "o-", color=shade, linewidth=2, markersize=4)
            lows, highs = zip(*(point.band for point in points), strict=True)
            axes.fill_between(counts, lows, highs, color=shade, alpha=0.15, linewidth=0)
            _mark(axes, counts[-1], means[-1], chr(ord("a") + number % 26), shade)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(each) for each in counts])
        axes.minorticks_off()
        axes.set_xlabel("labelled images")
        axes.set_ylabel(f"{metric}, %")
        axes.set_ylim(bottom=0)

    bands = f"Bands: {100 * curves.confidence:.0f} % intervals."
    return Figure(f"{metric} by number of labels", bands, _svg(draw))


def is_drawable(difference: PairedDifference) -> bool:
    """Whether its figures are percentage points, which those of a damaged file may not be."""
    return all(abs(v) <= 100 for v in (difference.mean, difference.low, difference.high))


def difference_figure(differences: Sequence[PairedDifference], names: Sequence[str]) -> Figure:
    """The deciding differences with their intervals; right of 0 the first of a pair is better.

    names: of the pairs, each at most two short lines.
    """
    rows = len(differences)

    def draw(axes: Axes) -> None:
        for row, difference in enumerate(differences):
            shade = colour(0) if difference.is_real else _INK
            axes.plot([difference.low, difference.high], [row, row], color=shade, linewidth=2)
            axes.plot([difference.mean], [row], "o", color=shade, markersize=6)
        axes.axvline(0, color=_INK, linestyle="--", linewidth=1)
        axes.set_yticks(
            range(rows), ["\n".join(map(plot_label, name.split("\n"))) for name in names]
        )
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xlabel(f"difference of {differences[0].metric}, percentage points")

    percent = 100 * differences[0].confidence
    return Figure(
        "Paired differences",
        f"Mean and {percent:.0f} % interval over seeds. Blue: more than chance, after correction "
        f"for the number of pairs.",
        _svg(draw, (_SIZE[0], 0.7 + 0.42 * rows), left=0.34),
    )


def _line(
    axes: Axes,
    run: Run,
    number: int,
    points: Points,
    style: str = "-",
    width: float = 1.7,
    named: bool = True,
) -> None:
    if not points:
        return
    points = thinned(points)
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        style,
        color=colour(number),
        linewidth=width,
        marker="o" if len(points) <= _FEW_POINTS and named else None,
        markersize=3.5,
    )
    if named:
        _mark(axes, *points[-1], run.letter, colour(number))


def _mark(axes: Axes, x: float, y: float, text: str, shade: str) -> None:
    """A letter at the end of a curve, for those who cannot tell the colours apart."""
    axes.annotate(
        text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=9,
        color=shade, fontweight="bold",
    )  # fmt: skip


def _svg(
    draw: Callable[[Axes], None], size: tuple[float, float] = _SIZE, left: float = 0.15
) -> Markup:
    """The SVG of what `draw` draws. size: inches. left: margin, as a share of the width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    style: Any = {  # its keys are a list of literals in matplotlib's types
        "svg.fonttype": "none", "svg.hashsalt": "dupr", "font.family": "sans-serif",
        "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "grid.color": _INK, "grid.alpha": 0.15,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "font.size": 9, "path.simplify": True,
    }  # fmt: skip
    with rc_context(style):
        figure = Canvas(figsize=size)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        # Finding the margins of every panel would take most of the time of a page.
        below = 0.5 / size[1]
        figure.subplots_adjust(left=left, right=0.95, bottom=below, top=0.97)
        axes.patch.set_alpha(0)
        draw(axes)
        if not axes.get_xlabel():
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.margins(x=0.06, y=0.1)
        if axes.get_ylim()[0] == 0 < axes.dataLim.y1:  # otherwise without room above
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_themed(buffer.getvalue()))


def _themed(text: str) -> str:
    """The <svg> element with the page's colours, its names distinct from those of other figures."""
    text = text[text.index("<svg") :]
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # The page's own fonts and size: the width follows the column.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r'\1 role="img"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = text.replace(_INK, "currentColor")
    for number in range(PALETTE):
        text = text.replace(colour(number), f"var(--c{number})")
    return text
