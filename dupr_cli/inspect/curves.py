"""The curves of runs, overlaid: held-out patch retrieval, signs of collapse, speed, and losses.

Every measure of every level has its own panel, and every run has a colour. A loss panel also shows
ln(1 + K), the loss of a network that cannot tell the positive from the K keys of its queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.errors import UsageError
from dupr_cli.outside_text import plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
_PANEL = (3.6, 2.7)  # inches
_FEW_POINTS = 15  # curves with at most this many points get markers
_GREY = "0.45"
_CHARACTERS = 9  # of the runs' names, per inch of the legend

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Run:
    name: str
    colour: str
    lines: list[dict[str, float]]

    def points(self, name: str) -> Points:
        return [(line["step"], line[name]) for line in self.lines if name in line]

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def lowest(self, prefix: str) -> Points:
        """At every step, the smallest of the values whose names begin with `prefix`."""
        found = (
            (line["step"], [value for name, value in line.items() if name.startswith(prefix)])
            for line in self.lines
        )
        return [(step, min(values)) for step, values in found if values]


def draw_curves(runs: Path | Sequence[Path], path: Path) -> None:
    """Write a PNG of the metrics.jsonl of one run or several.

    Raises UsageError when a run has no metrics.jsonl.
    """
    figure = curves_figure([runs] if isinstance(runs, Path) else runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def curves_figure(runs: Sequence[Path]) -> Figure:
    """The figure that `draw_curves` writes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    read = _read(runs)
    names = sorted({name for run in read for line in run.lines for name in line})
    retrieval = [name for name in names if name.startswith("retrieval/")]
    losses = [name for name in names if name.startswith("loss/")]
    head = [*retrieval, "spread", "speed"]
    columns = max(len(head), min(_COLUMNS, len(losses)))
    rows = [head, *(losses[i : i + columns] for i in range(0, len(losses), columns))]
    width = columns * _PANEL[0]
    longest = max(len(run.name) for run in read) + 6
    in_a_row = max(1, min(len(read), int(width * _CHARACTERS) // longest))
    legend = 0.15 + 0.22 * -(-len(read) // in_a_row)
    size = (width, len(rows) * _PANEL[1] + legend)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    panels = figure.subplot_mosaic([[*row, *["."] * (columns - len(row))] for row in rows])
    for name, axes in panels.items():
        if name == "speed":
            _draw_speed(axes, read)
        elif name == "spread":
            _draw_spread(axes, read)
        elif name in retrieval:
            _draw_retrieval(axes, read, name)
        else:
            _draw_loss(axes, read, name)
        _finish(axes, last=max(run.lines[-1]["step"] for run in read))
    figure.legend(
        panels["speed"].get_lines(),
        [plot_label(run.name) for run in read],
        loc="outside upper center",
        ncols=in_a_row,
        frameon=False,
    )
    return figure


def _read(runs: Sequence[Path]) -> list[_Run]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    few = len(runs) <= 10
    colours = [
        to_hex(colormaps["tab10" if few else "turbo"](i if few else i / (len(runs) - 1)))
        for i in range(len(runs))
    ]
    read = []
    for run, name, colour in zip(runs, run_names(runs), colours, strict=True):
        lines = [line for line in MetricsLog(run).read() if "step" in line]
        if not lines:
            raise UsageError(f"{run}: metrics.jsonl is missing or empty; give a run directory.")
        read.append(_Run(name, colour, lines))
    return read


def run_names(runs: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the runs' paths, of equal length."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _plot(
    axes: Axes, run: _Run, points: Points, factor: float = 1, style: str = "-", width: float = 1.6
) -> None:
    axes.plot(
        [step for step, _ in points],
        [factor * value for _, value in points],
        color=run.colour,
        marker="o" if len(points) <= _FEW_POINTS else None,
        clip_on=False,  # a point at 0 is drawn whole
        markersize=4,
        linestyle=style,
        linewidth=width,
    )


def _draw_retrieval(axes: Axes, runs: Sequence[_Run], name: str) -> None:
    level = name.removeprefix("retrieval/")
    for run in runs:
        _plot(axes, run, run.points(name), 100)
        _plot(axes, run, run.points(f"retrieval_same_flip/{level}"), 100, "--", 0.9)
        _plot(axes, run, run.points(f"retrieval_opposite_flip/{level}"), 100, ":", 1.1)
    pools = {run.last(f"retrieval_pool/{level}") for run in runs} - {None}
    of = f" of {pools.pop():,.0f} patches" if len(pools) == 1 else ", pools differ" if pools else ""
    axes.set_title(f"held-out patch retrieval, {level}")
    if any(run.points(f"retrieval_opposite_flip/{level}") for run in runs):
        axes.set_xlabel("step (dashed: same flip, dotted: opposite flip)")
    axes.set_ylabel(f"top-1{of} (%)")
    _from_zero(axes)


def _draw_loss(axes: Axes, runs: Sequence[_Run], name: str) -> None:
    place = name.removeprefix("loss/")
    references: dict[float, list[_Run]] = {}
    for run in runs:
        _plot(axes, run, run.points(name))
        value = run.last(f"reference/{place}")
        if value is not None:
            references.setdefault(value, []).append(run)
    for value, of in references.items():
        axes.axhline(
            value,
            color=_GREY if len(references) == 1 else of[0].colour,
            linestyle="--",
            linewidth=1,
            label=f"ln(1 + {math.exp(value) - 1:,.0f}) = {value:.2f}, guessing",
        )
    if references:
        low, high = axes.get_ylim()  # room below the curves for the legend
        axes.set_ylim(low - (0.06 + 0.09 * len(references)) * (high - low), high)
        axes.legend(fontsize=9, loc="lower right", frameon=False)
    kind, _, level = place.partition("/")
    axes.set_title(f"{kind} loss, {level}" if level else f"{kind} loss")
    axes.set_ylabel("loss (nats, not weighted)")


def _draw_spread(axes: Axes, runs: Sequence[_Run]) -> None:
    for run in runs:
        _plot(axes, run, run.lowest("spread/"))
    axes.set_title("spread of embeddings, lowest level")
    axes.set_ylabel("1 is healthy, 0 collapsed")
    _from_zero(axes, 1)


def _draw_speed(axes: Axes, runs: Sequence[_Run]) -> None:
    for run in runs:
        _plot(axes, run, run.points("images_per_second"))
    axes.set_title("speed")
    axes.set_ylabel("images per second")
    _from_zero(axes)


def _from_zero(axes: Axes, at_least: float = 0) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    axes.set_ylim(0, 1.08 * (max(float(values.max(initial=0)), at_least) or 1))


def _finish(axes: Axes, last: float) -> None:
    """Settings that all panels share. last: the last step of the longest run."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(-0.03 * last, max(1, 1.03 * last))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(axes.get_xlabel() or "step", fontsize=9)
    axes.yaxis.label.set_fontsize(9)
    axes.title.set_fontsize(10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
