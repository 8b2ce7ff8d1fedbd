"""`dupr pretrain`: pre-trains a backbone on shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import (
    Device,
    DryRun,
    Overwrite,
    Planned,
    Profile,
    Seed,
    Set,
    Workers,
    command,
    loading,
    overrides,
    shell_words,
)
from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.pretrain.types import PretrainResult


def add_to(app: typer.Typer) -> None:
    command(app, "pretrain", show, following=following)(pretrain)


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ] = None,
    recipe_option: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="The same as RECIPE.", show_default=False),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SHARDS",
            help="Shards: a directory, a .tar, or a pattern such as 'train-{000000..000009}.tar', "
            "local or remote (https://, s3://, ...).",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="RUN_DIR", help="Run directory, new or to continue."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Length of the run; overrides the recipe's epochs and steps."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option("--checkpoint-every", help="Steps between checkpoints.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Number of processes on this machine, one per GPU."),
    ] = None,
    nnodes: Annotated[
        int,
        typer.Option("--nnodes", min=1, help="Number of machines; give the same command on each."),
    ] = 1,
    rendezvous: Annotated[
        str,
        typer.Option(
            "--rendezvous", metavar="HOST:PORT", help="Address at which several machines meet."
        ),
    ] = "",
    max_hours: Annotated[
        float | None,
        typer.Option(
            "--max-hours", min=0, help="Save and stop after this time, with exit code 75."
        ),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            "--stop-after",
            min=1,
            help="Save and stop after this many steps of this call, with exit code 75.",
        ),
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            metavar="KEY",
            help="Continue although this recipe key (or `data`) has changed. Repeatable.",
        ),
    ] = None,
    profile: Profile = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            metavar="NAME[:PROJECT]",
            help="Send the metrics to trackio, wandb or mlflow too. Repeatable.",
        ),
    ] = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> PretrainResult | Planned | None:
    """Pre-train a backbone on shards.

    After an interruption, the same command continues from the newest checkpoint in RUN_DIR. On
    Ctrl-C, SIGTERM and SIGUSR1, the run finishes its step, saves and stops. Exit codes: 0
    finished, 75 stopped and saved (130 after Ctrl-C), 1 failed, 2 wrong usage or recipe.

    [bold]Examples[/]

      dupr pretrain dupr-r18-cpu-smoke --data shards/ --out runs/smoke

      dupr pretrain my-recipe.yaml --data shards/ --out runs/a --set optimizer.lr=0.06 --seed 1

      dupr pretrain dupr-r50-in1k-200ep --data shards/ --out runs/b --nproc 8
    """
    with loading():
        from dupr_cli import pretrain as stage
    from dupr_cli.cli.launch import launch
    from dupr_cli.recipe import PretrainRecipe, load_recipe

    if recipe and recipe_option:
        raise UsageError(
            f"two recipes are given, {recipe} and --recipe {recipe_option}; give only one."
        )
    name = recipe or recipe_option
    if name is None:
        raise UsageError("RECIPE is missing; `dupr recipe list` shows the shipped recipes.")
    if not data:
        raise UsageError("--data SHARDS is missing; `dupr prepare IMAGES SHARDS` makes them.")
    if out is None:
        raise UsageError("--out RUN_DIR is missing; give a directory for the run.")
    options = overrides(
        set_,
        epochs=("train.epochs", "null" if steps else None),
        steps=("train.steps", steps),
        checkpoint_every=("train.checkpoint_every", checkpoint_every),
        workers=("data.workers", workers),
        seed=("seed", seed),
    )
    resolved = load_recipe(PretrainRecipe, name, options)
    processes = (nproc or 1) * nnodes
    if dry_run:
        return Planned(
            resolved,
            stage.plan(
                resolved, data, out, device, processes,
                overwrite=overwrite, allow_changed=allow_changed or (), track=track or (),
            ),
        )  # fmt: skip
    if processes > 1 and "RANK" not in os.environ:
        # Checks the inputs once, before any process is started.
        stage.plan(
            resolved,
            data,
            out,
            device,
            processes,
            overwrite=overwrite,
            allow_changed=allow_changed or (),
            track=track or (),
        )
        launch(nproc or 1, nnodes, rendezvous, sys.argv[1:])
        return None
    from dupr_cli.runtime.profiling import profiling

    with profiling(out / "profile" if profile else None, reporter):
        return stage.run(
            resolved,
            data,
            out,
            device=device,
            overwrite=overwrite,
            allow_changed=allow_changed or (),
            max_hours=max_hours,
            stop_after=stop_after,
            track=track or (),
            reporter=reporter,
        )


def show(result: PretrainResult) -> None:
    from dupr_cli.cli.console import print_facts
    from dupr_cli.pretrain.retrieval_check import describe_retrieval, learned

    metrics = result.metrics
    facts = [("steps", str(result.steps))]
    if "loss" in metrics:
        facts.append(("loss", f"{metrics['loss']:.3f}"))
    facts += [
        ("patches found again", describe_retrieval(metrics, name.removeprefix("retrieval/")))
        for name in metrics
        if name.startswith("retrieval/")
    ]
    if verdict := learned(result.first_retrieval, metrics):
        facts.append(("learned", verdict))
    print_facts([*facts, ("run", result.run), ("checkpoint", result.checkpoint)])


def following(result: PretrainResult, arguments: Mapping[str, object]) -> str:
    return shell_words(
        "dupr", "export", result.run, "--to", "torchvision", "--out", "backbone.safetensors"
    )
