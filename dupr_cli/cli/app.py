"""The root command: its help, `--version`, and the subcommands in the order of use."""

from __future__ import annotations

from typing import Annotated, Any

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
from dupr_cli.cli.help_text import Group

# The stages first, in the order of use.
_COMMANDS = {
    "prepare": prepare,
    "pretrain": pretrain,
    "export": export,
    "evaluate": evaluate,
    "demo": demo,
    "plan": plan,
    "study": study,
    "bench": bench,
    "inspect": inspect,
    "report": report,
    "checkpoint": checkpoint,
    "import": import_,
    "recipe": recipe,
    "doctor": doctor,
}


class _Stages(Group):
    """Typer lists groups after the other commands; this keeps the order above."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(_COMMANDS).index)


app = typer.Typer(
    name="dupr",
    cls=_Stages,
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


for module in _COMMANDS.values():
    module.add_to(app)
