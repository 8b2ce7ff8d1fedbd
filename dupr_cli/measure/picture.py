"""The bars of `dupr bench`: where the time of a step goes, and the rates side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.outside_text import plot_label

if TYPE_CHECKING:
    from dupr_cli.measure.bench import BenchResult

_COLOUR, _BACKBONE_COLOUR = "#0072b2", "#999999"  # of the palette of Okabe and Ito
_MOST_PARTS = 8


def draw_bench(result: BenchResult, path: Path) -> None:
    """Write a PNG with two panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    parts, rates = figure.subplots(1, 2)
    shown = result.parts[:_MOST_PARTS][::-1]
    bars = parts.barh(
        [part.name for part in shown],
        [part.milliseconds for part in shown],
        color=[_BACKBONE_COLOUR if part.name == "backbone" else _COLOUR for part in shown],
    )
    parts.bar_label(bars, fmt="%.3g", padding=3)
    parts.margins(x=0.15)
    parts.set(title=f"A step of {result.measured_images} images", xlabel="milliseconds")
    values = {
        "from the shards": result.from_shards,
        "from memory": result.from_memory,
        "bare backbone": result.bare,
        **{f"{name}, one process": result.loader[name] for name in ("crop", "decode", "read")},
    }
    bars = rates.barh(list(values), list(values.values()), color=_COLOUR)
    rates.bar_label(bars, fmt="{:,.0f}", padding=3)
    rates.set(title=f"Bound by {result.bound}", xlabel="images/s", xscale="log")
    rates.margins(x=0.25)
    for axes in (parts, rates):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(plot_label(f"{result.recipe} on {result.device}"), fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
