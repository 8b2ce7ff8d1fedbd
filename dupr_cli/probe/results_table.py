"""The readable output of a probe: table.txt in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import cast

from dupr_cli.artifacts.results import DatasetIdentity, Results
from dupr_cli.outside_text import one_line

_WIDTH = 80
_NAME_WIDTH = 18


def table(results: Results) -> str:
    """Plain text: for each of the weights one row per level, and the chance level."""
    lines = textwrap.wrap(one_line(results.metric), _WIDTH)
    if results.train != results.test:
        lines += _described("Trained", results.train)
    lines += _described("Tested", results.test)
    columns = cast(Sequence[str], results.results[0].extra["columns"])
    levels = cast(Sequence[str], results.recipe["levels"])
    heads = {column: column.removeprefix("top1_") for column in columns}
    width = max(8, *map(len, heads.values())) + 1
    fitting = (_WIDTH - _NAME_WIDTH - 6) // width
    for first in range(0, len(columns), fitting):
        some = columns[first : first + fitting]
        lines += ["", _row("weights", "level", [heads[column] for column in some], width)]
        for entry in results.results:
            name = str(entry.extra["folder"])
            for level in levels:
                values = [entry.metrics[f"{level}/{column}"] for column in some]
                lines.append(_row(name, level, [f"{value:.2f}" for value in values], width))
        chance = cast(Mapping[str, float], results.results[0].extra["chance"])
        lines.append(_row("chance", "", [_chance(chance[column]) for column in some], width))
    lines.append("")
    for entry in results.results:
        text = f"{entry.extra['folder']}: {entry.weights} ({entry.architecture})"
        if entry.weights_sha256 is None:
            text += f"; batch-norm statistics {entry.extra['batch_norm']}"
        lines += textwrap.wrap(one_line(text), _WIDTH, subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def _row(name: str, level: str, cells: Sequence[str], width: int) -> str:
    name = one_line(name)
    short = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
    return f"{short:<{_NAME_WIDTH}} {level:<5}" + "".join(f"{c:>{width}}" for c in cells)


def _chance(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.4f}"


def _described(verb: str, used: DatasetIdentity) -> list[str]:
    text = f"{verb} on {used.images} images: {used.address}, split {used.split}"
    return textwrap.wrap(one_line(text), _WIDTH, subsequent_indent="  ")
