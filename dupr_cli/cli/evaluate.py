"""`dupr evaluate`: one subcommand per protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli import evaluate_probes
from dupr_cli.cli.command import (
    Device,
    DryRun,
    Overwrite,
    Recipe,
    Seed,
    Set,
    Workers,
    command,
    overrides,
)
from dupr_cli.cli.plan import show_plan
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.results import Results


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    command(group, "voc", show)(voc)
    evaluate_probes.add_to(group)

    @group.callback()
    def evaluate() -> None:
        """Measure what weights are worth: by a fine-tuned detector, or by probes."""

    app.add_typer(group, name="evaluate")


def voc(
    weights: Annotated[
        list[str],
        typer.Argument(
            metavar="WEIGHTS...",
            help="Run directories, checkpoints, weights files, or none for random weights.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="VOC_TREE_OR_SHARDS",
            help="A VOCdevkit, one year's folder, or labelled shards.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the results.")],
    train_split: Annotated[
        str, typer.Option("--train-split", help="Split to fine-tune on.")
    ] = "train",
    test_split: Annotated[str, typer.Option("--test-split", help="Split to test on.")] = "val",
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> Results | None:
    """Fine-tune a Faster R-CNN on each of the weights and compare AP, AP50, AP75 as VOC has them.

    All weights get the same budget, the same images and the same random numbers. Without
    --recipe the shipped voc-tiny is used: small images, minutes on a CPU.

    [bold]Examples[/]

      dupr evaluate voc backbone.safetensors none -r voc-tiny --data VOCdevkit/VOC2007 --out eval/

      dupr evaluate voc runs/a runs/b none -r voc-tiny --data shards/ --test-split test --out eval/
    """
    from dupr_cli import evaluate as stage
    from dupr_cli.recipe import EvaluateRecipe, load_recipe

    options = overrides(set_, workers=("train.workers", workers), seed=("seed", seed))
    resolved = load_recipe(EvaluateRecipe, recipe or "voc-tiny", options)
    if dry_run:
        plan = stage.plan(
            resolved,
            weights,
            data,
            out,
            train_split=train_split,
            test_split=test_split,
            device=device,
        )
        show_plan(resolved, plan)
        return None
    return stage.run(
        resolved,
        weights,
        data,
        out,
        train_split=train_split,
        test_split=test_split,
        device=device,
        overwrite=overwrite,
        reporter=reporter,
    )


def show(results: Results) -> None:
    from dupr_cli.cli.console import print_text
    from dupr_cli.evaluate.report import table

    print_text(table(results, [str(entry.extra["folder"]) for entry in results.results]))
