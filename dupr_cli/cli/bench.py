"""`dupr bench`: measures the parts of a recipe on this machine and names the one that bounds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Device, Set, Workers, command, loading, overrides
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.measure.bench import BenchResult


def add_to(app: typer.Typer) -> None:
    command(app, "bench", show)(bench)


def bench(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="SHARDS", help="Shards, as for `dupr pretrain`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PNG", help="Picture to write; replaces an existing one."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Time to measure for, about.")
    ] = 20.0,
    set_: Set = None,
    device: Device = "auto",
    workers: Workers = None,
    *,
    reporter: Reporter,
) -> BenchResult:
    """Measure the parts of pre-training on this machine, and name the one that bounds it.

    Real steps are made on images of SHARDS; nothing is kept. Measure with nothing else running.

    [bold]Examples[/]

      dupr bench dupr-r18-cpu-smoke --data shards/

      dupr bench dupr-r50-h100 --data shards/ --workers 16 --out bench.png --json
    """
    from dupr_cli.cli.inspect import require_png

    with loading():
        from dupr_cli.measure.bench import bench as measure

    if out is not None:
        require_png(out)
    options = overrides(set_, workers=("data.workers", workers))
    return measure(
        recipe, data, overrides=options, device=device, seconds=seconds, picture=out,
        reporter=reporter,
    )  # fmt: skip


def show(result: BenchResult) -> None:
    from dupr_cli.cli.console import print_facts, print_text

    whole = sum(part.milliseconds for part in result.parts)
    print_facts(
        [
            (part.name, f"{part.milliseconds:8.1f} ms  {part.milliseconds / whole:4.0%}")
            for part in result.parts
        ],
        f"A step of {result.measured_images} images, by part",
    )
    loader = result.loader
    print_text("")
    print_facts(
        [
            ("one loader process", f"{loader['all']:.0f} images/s (read {loader['read']:.0f}, "
             f"decode {loader['decode']:.0f}, crop {loader['crop']:.0f})"),
            ("bare backbone", f"{result.bare:.3g} images/s"),
            ("from memory", f"{result.from_memory:.3g} images/s, {result.overhead:.2f} times the "
             f"time of the bare backbone"),
            ("from the shards", f"{result.from_shards:.3g} images/s with {result.workers} workers, "
             f"waiting {result.waited:.0%} of the time"),
            ("device", f"{result.device}: {result.matrix_rate / 1e12:.3g} TFLOP/s in matrix "
             f"products, of which the backbone uses {result.utilisation:.0%}"),
            ("memory", f"{result.memory_gib:.1f} GiB"),
            ("workers", str(result.suggested_workers) + " suggested"),
            ("bound by", result.bound),
        ]
    )  # fmt: skip
    print_text(f"\n{result.advice}")
    if result.picture:
        print_text(f"\nThe picture is {result.picture}.")
