"""`dupr study`: many pre-training runs and evaluations as one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import (
    Device,
    DryRun,
    Planned,
    Set,
    command,
    loading,
    overrides,
    parse_task,
)
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.study.report import StudyReport


def add_to(app: typer.Typer) -> None:
    command(app, "study", show)(study)


def study(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Directory, new or to continue."),
    ],
    shards: Annotated[
        str | None,
        typer.Option("--shards", metavar="SHARDS", help="Unlabelled shards to pre-train on."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="LABELLED", help="The labelled set to evaluate on."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="I/N",
            help="Run part I of N, for job arrays; the last to end writes the report.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="here, or ray on a running Ray cluster.")
    ] = "here",
    max_hours: Annotated[
        float | None,
        typer.Option(
            "--max-hours", min=0, help="Save and stop after this time, with exit code 75."
        ),
    ] = None,
    set_: Set = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> StudyReport | Planned | None:
    """Compare methods, seeds and numbers of labels: many runs, one report.

    Every cell of the table is an ordinary run or evaluation in its own folder. What is finished is
    not run again, and the same command continues after any interruption.

    [bold]Examples[/]

      dupr study small-cpu --shards unlabelled/ --data VOC2012/ --out study/

      dupr study mine.yaml --out study/ --task 3/8
    """
    with loading():
        from dupr_cli import study as package
    from dupr_cli.recipe import load_recipe
    from dupr_cli.recipe.study import StudyRecipe

    given = overrides(set_, shards=("shards", shards), data=("data", data))
    resolved = load_recipe(StudyRecipe, recipe, given)
    part = parse_task(task)
    if dry_run:
        return Planned(resolved, package.plan(resolved, out, task=part))
    return package.run(
        resolved,
        out,
        device=device,
        task=part,
        engine=engine,
        max_hours=max_hours,
        reporter=reporter,
    )


def show(report: StudyReport) -> None:
    from dupr_cli.cli.console import print_markdown, print_text
    from dupr_cli.study.report import markdown

    print_markdown(markdown(report))
    print_text(f"{report.out}/report.md, .csv, .tex, .json")
