"""The root command: its help, `--version`, and the subcommands in the order of use."""

from __future__ import annotations

from typing import Annotated

import typer

from dupr_cli import __version__
from dupr_cli.cli import (
    bench,
    checkpoint,
    demo,
    doctor,
    evaluate,
    export,
    import_,
    inspect,
    plan,
    prepare,
    pretrain,
    recipe,
    report,
    study,
)
from dupr_cli.cli.command import Quiet, Traceback, Verbose, root_globals

app = typer.Typer(
    name="dupr",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dupr {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    traceback: Traceback = False,
) -> None:
    """Turn unlabelled images into backbone weights that make an object detector better.

    The four stages, each useful alone:

      dupr prepare  IMAGES SHARDS
      dupr pretrain dupr-r18-cpu-smoke --data SHARDS --out RUN
      dupr export   RUN --to torchvision --out backbone.safetensors
      dupr evaluate voc backbone.safetensors none --data VOC_TREE --out RESULTS

    `dupr demo` runs all four on generated images, in minutes on a CPU.
    """
    root_globals.quiet, root_globals.verbose = quiet, verbose
    root_globals.traceback = traceback


for module in (
    prepare,
    plan,
    pretrain,
    export,
    import_,
    evaluate,
    study,
    demo,
    checkpoint,
    bench,
    inspect,
    report,
    recipe,
    doctor,
):
    module.add_to(app)
