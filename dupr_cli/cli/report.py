"""`dupr report`: one HTML page about runs and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Device, command, loading
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.report import Report


def add_to(app: typer.Typer) -> None:
    command(app, "report", show)(report)


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_RESULTS...",
            help="Run directories, evaluations, comparisons over labels, studies; any number.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="HTML", help="Page to write; replaces an earlier one."),
    ],
    shards: Annotated[
        str | None,
        typer.Option(
            "--shards",
            metavar="SHARDS",
            help="Shards of the runs, to show views and matches of held-out images.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image whose matches to show; repeatable."),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "",
    device: Device = "auto",
    *,
    reporter: Reporter,
) -> Report:
    """Write one HTML page about runs and evaluations, which needs nothing beside itself.

    The page says in words whether runs learn and what helps the detector, and has curves, tables
    with intervals, labels saved, differences of recipes, and the environment.

    [bold]Examples[/]

      dupr report runs/a --out report.html

      dupr report runs/a runs/b eval/ --shards shards/ --out report.html
    """
    with loading():
        from dupr_cli.report import run

    return run(
        sources, out, shards=shards, images=image or [], title=title, device=device,
        reporter=reporter,
    )  # fmt: skip


def show(written: Report) -> None:
    from dupr_cli.cli.console import print_facts

    about = [
        (kind, ", ".join(names))
        for kind, names in (
            ("runs", written.runs),
            ("evaluations", written.results),
            ("labels", written.labels),
            ("studies", written.studies),
        )
        if names
    ]
    size = f"{written.bytes / 1e6:.1f} MB" if written.bytes >= 1e5 else f"{written.bytes:,} bytes"
    print_facts([("written to", written.path), ("size", size), *about])
