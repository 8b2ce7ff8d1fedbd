"""The curves of a run: losses, held-out patch retrieval, and signs of collapse."""

from __future__ import annotations

from pathlib import Path

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.errors import UsageError


def draw_curves(run: Path, path: Path) -> None:
    """Write a PNG of a run's metrics.jsonl. Raises UsageError when there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = MetricsLog(run).read()
    if not lines:
        raise UsageError(f"{run}: no metrics.jsonl with a line in it.")
    names = sorted({name for line in lines for name in line})
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss of each level and kind", "loss/"),
        ("held-out patch retrieval, top-1 (%)", "retrieval/"),
        ("spread of embeddings (collapse is 0)", "spread/"),
    )
    for axes, (title, prefix) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in (n for n in names if n.startswith(prefix)):
            points = [(line["step"], line[name]) for line in lines if name in line]
            factor = 100 if prefix == "retrieval/" else 1
            axes.plot(
                [step for step, _ in points],
                [factor * value for _, value in points],
                marker="o" if len(points) < 15 else None,
                label=name.removeprefix(prefix),
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
