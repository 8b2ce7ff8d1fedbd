"""`dupr import`: converts public checkpoints to weights files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import Overwrite, command, loading
from dupr_cli.errors import UsageError

if TYPE_CHECKING:
    from dupr_cli.export.public_checkpoints import Imported


def add_to(app: typer.Typer) -> None:
    command(app, "import", show)(import_checkpoint)


def import_checkpoint(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .safetensors, .pth, .pth.tar, .pt, .bin or .ckpt file, or hf://OWNER/NAME/FILE.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The weights file to write.")
    ] = Path("imported.safetensors"),
    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            help="Prefix of the wanted network's names, if the file holds several networks.",
        ),
    ] = None,
    input_mean: Annotated[
        str | None,
        typer.Option(
            "--input-mean", help="Mean of its input, R,G,B in 0..1; ImageNet's by default."
        ),
    ] = None,
    input_std: Annotated[
        str | None,
        typer.Option(
            "--input-std",
            help="Standard deviation of its input, R,G,B in 0..1; ImageNet's by default.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> Imported:
    """Make a weights file from a public ResNet checkpoint, for comparison or as a start.

    The names of torchvision, timm, MoCo, SwAV, DINO, DenseCL, DetCo, MMSelfSup, OpenSelfSup,
    lightly, transformers and detectron2 are recognised; heads and queues are left out. Pickled
    files are read without running code, or refused.

    [bold]Examples[/]

      dupr import moco_v2_200ep_pretrain.pth.tar --out moco-v2.safetensors

      dupr import dino_resnet50_pretrain.pth --out dino.safetensors

      dupr import checkpoint.pth --prefix teacher.backbone. --out teacher.safetensors
    """
    with loading():
        from dupr_cli.export.public_checkpoints import import_weights
    from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD

    return import_weights(
        checkpoint,
        out,
        prefix=prefix,
        mean=_three(input_mean, "--input-mean") if input_mean else IMAGENET_MEAN,
        std=_three_above_0(input_std, "--input-std") if input_std else IMAGENET_STD,
        overwrite=overwrite,
    )


def _three(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise UsageError(f"{option} {text}: give three numbers separated by commas.")
    return values


def _three_above_0(text: str, option: str) -> tuple[float, ...]:
    values = _three(text, option)
    if min(values) <= 0:
        raise UsageError(
            f"{option} {text}: pixels are divided by these numbers, so give numbers above 0."
        )
    return values


def show(imported: Imported) -> None:
    from dupr_cli.cli.console import print_facts

    facts = [
        ("written to", imported.path),
        ("backbone", f"{imported.architecture}, all {imported.tensors} tensors"),
        ("names", f"{imported.naming}'s, under {imported.prefix!r}"),
        ("left out", f"{imported.left_out} tensors that are not part of it"),
        ("sha256", imported.sha256),
    ]
    if imported.others:
        others = ", ".join(map(repr, imported.others))
        facts.insert(3, ("other networks", f"{others}; choose one with --prefix"))
    print_facts([*facts, *(("note", note) for note in imported.notes)])
