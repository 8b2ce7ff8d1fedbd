"""`dupr export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import DryRun, Overwrite, Recipe, Set, command, overrides
from dupr_cli.cli.plan import show_plan
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.export import ExportResult


def add_to(app: typer.Typer) -> None:
    command(app, "export", show)(export)


def export(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_WEIGHTS", help="A run directory, a checkpoint or a weights file."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORMAT", help="Layout of the file: torchvision."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            help="The file to write, or a directory that gets backbone.safetensors.",
        ),
    ] = Path("backbone.safetensors"),
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="OWNER/NAME",
            help="Also commit it, with a model card, to this repository of the Hugging Face Hub.",
        ),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> ExportResult | None:
    """Write backbone weights in the layout that a framework loads.

    The file is loaded back into the framework's model and its features are compared before it
    gets its name.

    [bold]Examples[/]

      dupr export runs/smoke --to torchvision --out backbone.safetensors

      dupr export runs/smoke --to torchvision --out out/ --push-to-hub me/my-backbone
    """
    from dupr_cli import export as stage
    from dupr_cli.export.hub import check_repository
    from dupr_cli.recipe import ExportRecipe, load_recipe

    if push_to_hub:
        check_repository(push_to_hub)
    resolved = load_recipe(ExportRecipe, recipe or "default", overrides(set_, to=("format", to)))
    if dry_run:
        show_plan(resolved, stage.plan(resolved, weights, out, push_to_hub))
        return None
    return stage.run(
        resolved, weights, out, push_to_hub=push_to_hub, overwrite=overwrite, reporter=reporter
    )


def show(result: ExportResult) -> None:
    from dupr_cli.cli.console import print_facts

    facts = [
        ("written to", f"{result.path} ({result.bytes / 1e6:.1f} MB)"),
        ("layout", f"{result.format}, {result.architecture}, {result.tensors} tensors"),
        ("loads back", f"yes; largest difference of features {result.max_difference:.1e}"),
        ("sha256", result.sha256),
    ]
    if result.hub_url:
        facts.append(("on the Hub", result.hub_url))
    print_facts(facts)
