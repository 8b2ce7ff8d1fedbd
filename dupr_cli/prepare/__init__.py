"""Stage 1, `dupr prepare`: images of any layout to WebDataset shards with a manifest.

sources.py lists what there is, ingest.py decodes and repairs one image, writer.py fills shards in
the order of the source, whatever the number of workers, and goes on after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import PrepareRecipe


@dataclass(frozen=True)
class PreparePlan:
    """What a preparation will do, before it does it."""

    source: str
    kind: str
    items: dict[str, int]
    shards: int
    out: str


@dataclass(frozen=True)
class PrepareResult:
    """What a finished preparation left behind. samples: per split."""

    out: str
    samples: dict[str, int]
    shards: int
    bytes: int
    skipped: int
    skip_reasons: dict[str, int]


def plan(recipe: PrepareRecipe, source: Path, out: Path) -> PreparePlan:
    """List the source and say what `run` would do. Raises UsageError."""
    from dupr_cli.prepare.sources import open_source
    from dupr_cli.prepare.writer import check_output

    opened = open_source(source, recipe, out)
    check_output(recipe, opened, out, overwrite=True)
    size = recipe.shard.max_samples
    return PreparePlan(
        source=str(source),
        kind=opened.kind,
        items={split: len(items) for split, items in opened.splits.items()},
        shards=sum(-(-len(items) // size) for items in opened.splits.values()),
        out=str(out),
    )


def run(
    recipe: PrepareRecipe,
    source: Path,
    out: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> PrepareResult:
    """Write the shards of `source` into `out`, or finish what an interrupted call began.

    workers: processes that decode; 0 means one per core.
    Raises UsageError when the source has no images or `out` holds something else, RunError when
    no image could be used.
    """
    from dupr_cli.prepare.sources import open_source
    from dupr_cli.prepare.writer import write_all

    opened = open_source(source, recipe, out)
    return write_all(recipe, opened, out, workers, overwrite, reporter or SilentReporter())
