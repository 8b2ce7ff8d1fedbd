"""`dupr demo`: runs all stages on generated images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Device, DryRun, Overwrite, Seed, Workers, command, loading
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.demo import DemoResult


def add_to(app: typer.Typer) -> None:
    command(app, "demo", show)(demo)


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for all files of the demo.")
    ] = Path("dupr-demo"),
    seed: Seed = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> DemoResult | None:
    """Run all four stages on generated images and print one table, in minutes on a CPU.

    The demo generates scenes, makes shards from them, and pre-trains a ResNet-18 without labels.
    It then trains a detector on a few labelled scenes, once on frozen features of those weights and
    once of random ones. The table reports the measurements, whichever weights win.

    [bold]Example[/]

      dupr demo --out demo/
    """
    with loading():
        from dupr_cli import demo as package

    if dry_run:
        from dupr_cli.cli.console import print_text

        print_text(package.describe(out))
        return None
    return package.run(
        out,
        seed=seed or 0,
        device=device,
        workers=workers,
        overwrite=overwrite,
        reporter=reporter,
    )


def show(result: DemoResult) -> None:
    from dupr_cli.cli.console import print_text

    print_text(result.report)
