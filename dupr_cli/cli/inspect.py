"""`dupr inspect`: draws pairs of views, and the curves of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dupr_cli.cli.command import Seed, Set, command, overrides
from dupr_cli.cli.help_text import Group
from dupr_cli.errors import UsageError

Out = Annotated[
    Path,
    typer.Option("--out", metavar="PNG", help="Picture to write; replaces an existing one."),
]


@dataclass(frozen=True)
class Picture:
    """path: of the PNG. shows: keys of the images, or the runs."""

    path: str
    shows: list[str]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich")

    @group.callback()
    def inspect() -> None:
        """Draw what pre-training sees and how runs went."""

    command(group, "views", show)(views)
    command(group, "curves", show)(curves)
    app.add_typer(group, name="inspect")


def views(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="SHARDS", help="Shards, as for `dupr pretrain`."),
    ],
    out: Out,
    count: Annotated[
        int, typer.Option("--count", min=1, max=100, help="Number of images, one row each.")
    ] = 6,
    set_: Set = None,
    seed: Seed = None,
) -> Picture:
    """Draw pairs of views as pre-training makes them, with the bins that match.

    Held-out images are taken first, then the first images of the shards.

    [bold]Examples[/]

      dupr inspect views dupr-r18-cpu-smoke --data shards/ --out views.png

      dupr inspect views my-recipe.yaml --data shards/ --out v.png --count 9 --seed 1
    """
    from dupr_cli.recipe import PretrainRecipe, load_recipe

    require_png(out)
    resolved = load_recipe(PretrainRecipe, recipe, overrides(set_, seed=("seed", seed)))
    from dupr_cli.inspect.views import draw_views

    return Picture(str(out), draw_views(out, resolved, data, count))


def curves(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, overlaid.")
    ],
    out: Out,
) -> Picture:
    """Draw the curves of one or several runs: patch retrieval, losses, spread, speed.

    This also works while a run is in progress. Losses are shown with ln(1 + K), the loss of
    guessing.

    [bold]Examples[/]

      dupr inspect curves runs/smoke --out curves.png

      dupr inspect curves runs/a runs/b runs/c --out curves.png
    """
    from dupr_cli.inspect.curves import draw_curves

    require_png(out)
    draw_curves(runs, out)
    return Picture(str(out), [str(run) for run in runs])


def require_png(out: Path) -> None:
    """Raises UsageError unless `out` is the name of a PNG, because an existing file is replaced."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: a PNG is written; give a name that ends in .png.")
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; give the name of a file.")


def show(picture: Picture) -> None:
    from dupr_cli.cli.console import print_facts

    print_facts([("written to", picture.path), ("shows", ", ".join(picture.shows))])
