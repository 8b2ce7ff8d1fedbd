"""`dupr plan`: proposes a recipe for shards, a machine and a detector, with its time measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Device, Overwrite, Recipe, Set, command, loading, shell_words
from dupr_cli.outside_text import one_line
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.measure.plan import Proposal


def add_to(app: typer.Typer) -> None:
    command(app, "plan", show, following=following)(plan)


def plan(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Shards, as for `dupr pretrain --data`.")
    ],
    recipe: Recipe = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            metavar="NAME",
            help="The detector to make better, which decides the backbone: torchvision, "
            "detectron2, mmdetection, detr, rt-detr-r18, d-fine-s, ...",
        ),
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", min=0, help="Time that the run may take.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="YAML", help="Recipe file to write.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Time to measure for, about.")
    ] = 20.0,
    set_: Set = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    *,
    reporter: Reporter,
) -> Proposal:
    """Propose a recipe for these images, this machine and a detector, and say what it costs.

    A few real steps are measured. Without RECIPE the values are chosen for the images and the
    device; with it only what does not fit is changed.

    [bold]Examples[/]

      dupr plan shards/ --hours 8 --write mine.yaml

      dupr plan shards/ --detector rt-detr-r18 --hours 24 --write mine.yaml

      dupr plan shards/ --recipe dupr-r50-in1k-200ep
    """
    with loading():
        from dupr_cli.measure.plan import propose

    return propose(
        shards, recipe=recipe, detector=detector, hours=hours, overrides=set_ or [],
        device=device, seconds=seconds, write=write, overwrite=overwrite,
        reporter=reporter,
    )  # fmt: skip


def show(proposal: Proposal) -> None:
    import json

    from dupr_cli.cli.console import print_facts, print_sentences
    from dupr_cli.pretrain.estimate import describe_hours

    cost = proposal.estimate
    print_facts(
        [
            ("images", f"{proposal.images:,} to train on, shorter side {proposal.shorter_side}"),
            ("device", proposal.device),
            ("recipe", proposal.base + (", with:" if proposal.keys else ", as it is")),
        ]
    )
    for choice in proposal.keys:
        print_sentences(f"  {choice.key}={json.dumps(choice.value)}  ({choice.why})", "    ")
    print_facts(
        [
            ("length", f"{proposal.steps:,} steps, {proposal.epochs:g} epochs"),
            ("time", f"{describe_hours(cost.hours)} at {cost.images_per_second:.3g} images/s"),
            ("memory", f"{cost.memory_gib:.1f} GiB"),
            ("disk", f"{cost.disk_gib:.1f} GiB of checkpoints"),
        ]
    )
    for warning in proposal.warnings:
        print_sentences(f"warning: {one_line(warning)}", "  ")


def following(proposal: Proposal, arguments: Mapping[str, object]) -> str:
    if not proposal.written:
        return "--write FILE writes it as a recipe"
    return shell_words(
        "dupr", "pretrain", proposal.written, "--data", proposal.data, "--out", "RUN"
    )
