"""`dupr inspect`: draws views, curves, matches, neighbours, features; describes weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import COMMON, Device, Seed, Set, command, loading, overrides
from dupr_cli.cli.help_text import Group
from dupr_cli.errors import UsageError
from dupr_cli.outside_text import one_line
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.artifacts.pixel_formats import AnyImage
    from dupr_cli.inspect.features import Features
    from dupr_cli.inspect.matches import Matches
    from dupr_cli.inspect.neighbours import Neighbours
    from dupr_cli.inspect.network import Network
    from dupr_cli.inspect.weights import WeightsReport

Out = Annotated[
    Path,
    typer.Option("--out", metavar="PNG", help="Picture to write; replaces an existing one."),
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run directory or checkpoint, or weights without heads (features are compared).",
    ),
]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")]
Draw = Annotated[
    int,
    typer.Option("--seed", min=0, help="Seed of what is drawn at random.", rich_help_panel=COMMON),
]
_MOST_ROWS = 24  # of a comparison on a terminal; --json lists all


@dataclass(frozen=True)
class Picture:
    """path: of the PNG. shows: keys of the images, or the runs."""

    path: str
    shows: list[str]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich")

    @group.callback()
    def inspect() -> None:
        """Draw what pre-training sees, how runs went, and what weights have learned."""

    command(group, "views", show)(views)
    command(group, "curves", show)(curves)
    command(group, "matches", show_matches)(matches)
    command(group, "neighbours", show_neighbours)(neighbours)
    command(group, "features", show_features)(features)
    command(group, "weights", show_weights)(weights)
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
    with loading():
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
    with loading():
        from dupr_cli.inspect.curves import draw_curves

    require_png(out)
    draw_curves(runs, out)
    return Picture(str(out), [str(run) for run in runs])


def matches(
    run: Run,
    images: Images,
    out: Out,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch",
            metavar="X,Y",
            help="Place of a patch to show, in pixels of the image or in fractions; repeatable.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=0, max=20, help="Number of random patches of each image.")
    ] = 1,
    seed: Draw = 0,
    device: Device = "auto",
) -> Matches:
    """Draw which patches are found again in another view, and in other images.

    Two views of each image are cut by the run's recipe. The patches with the best and the worst
    rank are shown, then those of --patch or random ones: as heat maps of cosine similarity at each
    level, over the other view and over the next image.

    [bold]Examples[/]

      dupr inspect matches runs/a one.jpg two.jpg --out matches.png

      dupr inspect matches runs/a one.jpg --patch 0.4,0.6 --out matches.png
    """
    places = [_place(text) for text in patch or []]
    require_png(out, images)
    with loading():
        from dupr_cli.inspect.matches import draw_matches
    from dupr_cli.inspect.network import open_network
    from dupr_cli.runtime.devices import choose_device

    network = open_network(run, choose_device(device))
    return draw_matches(out, network, _opened(network, images), places, count, seed)


def neighbours(
    run: Run,
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="A folder of images, or shards.")],
    out: Out,
    level: Annotated[
        str | None,
        typer.Option(
            "--level", help="Level of the patches; the deepest with a patch loss if left out."
        ),
    ] = None,
    queries: Annotated[
        int, typer.Option("--queries", min=1, max=50, help="Number of query patches, one row each.")
    ] = 6,
    count: Annotated[
        int, typer.Option("--count", min=1, max=20, help="Number of neighbours of each.")
    ] = 8,
    limit: Annotated[
        int,
        typer.Option("--limit", min=2, help="Search at most this many images, drawn by --seed."),
    ] = 500,
    seed: Draw = 0,
    device: Device = "auto",
    *,
    reporter: Reporter,
) -> Neighbours:
    """Draw the nearest patches over a set of images, for some random query patches.

    [bold]Examples[/]

      dupr inspect neighbours runs/a shards/ --out neighbours.png

      dupr inspect neighbours runs/a photos/ --level res4 --queries 10 --out n.png
    """
    require_png(out)
    with loading():
        from dupr_cli.inspect.neighbours import draw_neighbours
    from dupr_cli.inspect.images import open_images
    from dupr_cli.inspect.network import open_network, parse_level
    from dupr_cli.runtime.devices import choose_device

    wanted = parse_level(level)
    network = open_network(run, choose_device(device))
    searched = open_images(images, network.taken.input.pixels, reporter)
    return draw_neighbours(out, network, searched, reporter, wanted, queries, count, limit, seed)


def features(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS",
            help="A run, checkpoint, weights file, hf://OWNER/NAME, torchvision:NAME or none.",
        ),
    ],
    images: Images,
    out: Out,
    size: Annotated[
        int,
        typer.Option("--size", min=32, max=2048, help="Longer side that the network sees, pixels."),
    ] = 448,
    device: Device = "auto",
) -> Features:
    """Draw the principal components of each level's features as colours.

    The same colour means the same in all images of one picture. The word none stands for random
    weights.

    [bold]Examples[/]

      dupr inspect features runs/a one.jpg two.jpg --out features.png

      dupr inspect features backbone.safetensors one.jpg --size 640 --out features.png
    """
    require_png(out, images)
    with loading():
        from dupr_cli.inspect.features import draw_features
    from dupr_cli.inspect.network import open_frozen, read_image
    from dupr_cli.runtime.devices import choose_device

    taken, frozen = open_frozen(weights, choose_device(device))
    opened = [(path.name, read_image(path, taken.input.pixels)) for path in images]
    return draw_features(out, taken, frozen, opened, size)


def weights(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A weights file or any .safetensors, a run, a checkpoint, or hf://OWNER/NAME.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OTHER", help="Weights to compare with, layer by layer."),
    ] = None,
) -> WeightsReport:
    """Print what a weights file holds, or how it differs from another.

    With --against, each tensor is equal bit for bit, changed (with the L2 norm of the difference
    relative to that of the first), of another shape, missing from OTHER, or extra in it.

    [bold]Examples[/]

      dupr inspect weights backbone.safetensors

      dupr inspect weights runs/a --against runs/b --json
    """
    with loading():
        from dupr_cli.inspect.weights import inspect_weights

    return inspect_weights(file, against)


def _place(text: str) -> tuple[float, float]:
    """x and y of `--patch X,Y`. Raises UsageError."""
    parts = text.split(",")
    try:
        x, y = (float(part) for part in parts)
    except ValueError:
        x, y = -1.0, -1.0
    if not (0 <= x < float("inf") and 0 <= y < float("inf")):
        raise UsageError(f"--patch {text}: give X,Y, for example 0.4,0.6 or 210,130.")
    return x, y


def _opened(network: Network, images: list[Path]) -> list[tuple[str, AnyImage]]:
    from dupr_cli.inspect.network import read_image

    return [(path.name, read_image(path, network.taken.input.pixels)) for path in images]


def require_png(out: Path, images: Sequence[Path] = ()) -> None:
    """Raises UsageError unless `out` is the name of a PNG, because an existing file is replaced.

    images: files that are read, which must stay.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: a PNG is written; give a name that ends in .png.")
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; give the name of a file.")
    if out.resolve() in (image.resolve() for image in images):
        raise UsageError(f"--out {out} is one of the images; give another name.")


def show(picture: Picture) -> None:
    from dupr_cli.cli.console import print_facts

    print_facts([("written to", picture.path), ("shows", ", ".join(picture.shows))])


def show_matches(found: Matches) -> None:
    from dupr_cli.cli.console import print_facts

    pool = {match.level: match.pool for match in found.patches}
    print_facts(
        [
            ("written to", found.path),
            ("shows", ", ".join(found.shows)),
            ("compared", found.note),
            *(
                (f"found at {level}", f"{share:.1f} % of {pool[level]} patches")
                for level, share in found.found.items()
            ),
        ]
    )


def show_neighbours(found: Neighbours) -> None:
    from dupr_cli.cli.console import print_facts

    print_facts(
        [
            ("written to", found.path),
            ("compared", f"{found.level}, {found.note}"),
            ("searched", f"{found.patches} patches of {found.images} images"),
            ("queries", str(len(found.queries))),
        ]
    )


def show_features(found: Features) -> None:
    from dupr_cli.cli.console import print_facts

    shares = ", ".join(f"{level} {share:.0f} %" for level, share in found.explained.items())
    print_facts(
        [
            ("written to", found.path),
            ("shows", ", ".join(found.shows)),
            ("variance shown", shares),
        ]
    )


def show_weights(found: WeightsReport) -> None:
    from dupr_cli.cli.console import print_facts, print_table, print_text

    print_facts(
        [
            ("weights", found.address),
            ("sha256", found.sha256),
            ("parameters", f"{found.parameters:,} in {len(found.tensors)} tensors"),
            *(
                (key, str(value))
                for key, value in found.metadata.items()
                if value not in (None, "", ())
            ),
        ]
    )
    if found.against is None:
        rows = [
            (
                each.name,
                " x ".join(map(str, each.shape)) or "scalar",
                each.kind,
                "not finite" if each.norm is None else f"{each.norm:.4g}",
            )
            for each in found.tensors
        ]
        print_text("")
        print_table(("tensor", "shape", "type", "L2 norm"), rows)
        return
    compared = found.against
    counts = ", ".join(f"{count} {state}" for state, count in compared.counts.items())
    distance = (
        "" if compared.distance is None else f"; relative L2 distance {compared.distance:.3g}"
    )
    print_text(f"\nagainst {one_line(compared.address)}: {counts}{distance}")
    differing = [layer for layer in compared.layers if layer.state != "equal"]
    differing.sort(key=lambda layer: -(layer.distance or 0.0))
    rows = [
        (
            layer.name,
            layer.state,
            "" if layer.distance is None else f"{layer.distance:.3g}",
            "" if layer.largest is None else f"{layer.largest:.3g}",
        )
        for layer in differing[:_MOST_ROWS]
    ]
    if rows:
        print_table(("tensor", "state", "relative L2", "by at most"), rows)
    if len(differing) > _MOST_ROWS:
        print_text(f" and {len(differing) - _MOST_ROWS} more; --json lists all")
