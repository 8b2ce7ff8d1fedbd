"""`dupr prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import (
    DryRun,
    Overwrite,
    Recipe,
    Set,
    Workers,
    command,
    overrides,
)
from dupr_cli.cli.plan import show_plan
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.prepare import PrepareResult


def add_to(app: typer.Typer) -> None:
    command(app, "prepare", show)(prepare)


def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images (any depth), a VOC tree, or WebDataset shards.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory for the shards.")],
    recipe: Recipe = None,
    set_: Set = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> PrepareResult | None:
    """Make shards out of images.

    What SOURCE is, is seen from its contents. Images that do not decode are left out and listed
    in OUT/skipped.jsonl with the reason. The same command after an interruption goes on.

    [bold]Examples[/]

      dupr prepare photos/ shards/

      dupr prepare VOCdevkit/VOC2007 voc07/ --set shard.max_samples=500
    """
    from dupr_cli import prepare as stage
    from dupr_cli.recipe import PrepareRecipe, load_recipe

    resolved = load_recipe(PrepareRecipe, recipe or "default", overrides(set_))
    if dry_run:
        show_plan(resolved, stage.plan(resolved, source, out))
        return None
    return stage.run(
        resolved, source, out, workers=workers or 0, overwrite=overwrite, reporter=reporter
    )


def show(result: PrepareResult) -> None:
    from dupr_cli.cli.console import print_facts

    facts = [(split, f"{count} images") for split, count in result.samples.items()]
    facts.append(("shards", f"{result.shards}, {result.bytes / 1e6:.1f} MB"))
    if result.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.skip_reasons.items())
        facts.append(("left out", f"{result.skipped}: {reasons} ({result.out}/skipped.jsonl)"))
    print_facts([*facts, ("written to", result.out)])
