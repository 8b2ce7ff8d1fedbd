"""`dupr export`: writes backbone weights for other frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dupr_cli.cli.command import (
    DryRun,
    Overwrite,
    Planned,
    Recipe,
    Set,
    command,
    loading,
    overrides,
    shell_words,
)
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.export.arrival import Arrival, Checked
    from dupr_cli.export.types import ExportResult


def add_to(app: typer.Typer) -> None:
    command(app, "export", show, following=following)(export)


def export(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_WEIGHTS",
            help="A run directory, a checkpoint, a weights file or hf://OWNER/NAME.",
        ),
    ],
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="torchvision, timm, transformers, d-fine, rt-detr, detectron2, mmdetection, "
            "onnx, safetensors; repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="A folder, or the file itself for a single format of one file.",
            show_default="backbone.safetensors, or exported/",
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            metavar="DETECTOR",
            help="Write nothing, but load the backbone into this detector, or find it there: a "
            "folder or configuration of transformers, a .safetensors or .pth file, or a name such "
            "as fasterrcnn_resnet50_fpn; repeatable.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", metavar="query|key", help="The trained encoder, or its moving average."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="OWNER/NAME",
            help="Also commit all files and a model card to this repository of the Hugging Face "
            "Hub.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Commit to this branch, which is created if necessary."),
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option("--commit-message", help="Message of the commit on the Hub.")
    ] = None,
    token_from_env: Annotated[
        str | None,
        typer.Option(
            "--token-from-env",
            metavar="VARIABLE",
            help="Environment variable with the token, if it is not HF_TOKEN.",
        ),
    ] = None,
    local_only: Annotated[
        bool,
        typer.Option(
            "--local-only",
            help="With --push-to-hub: write model card and files, but push nothing.",
        ),
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="DIR",
            help="Evaluation for the model card, besides those next to the run; repeatable.",
        ),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    *,
    reporter: Reporter,
) -> ExportResult | Checked | Planned:
    """Write backbone weights in the layouts that frameworks load.

    If the framework is installed, the files are loaded into it and its features are compared
    before the files get their names. --check proves that a backbone arrives in a detector. With
    --push-to-hub, --local-only writes the folder that would be pushed.

    [bold]Examples[/]

      dupr export runs/smoke --to torchvision --out backbone.safetensors

      dupr export runs/smoke --to timm --to transformers --to detectron2 --out exported/

      dupr export runs/smoke --check my-rt-detr/ --check fasterrcnn_resnet50_fpn

      dupr export runs/smoke --to timm --push-to-hub me/my-backbone --set card.license=cc-by-4.0
    """
    import json

    with loading():
        from dupr_cli import export as stage
    from dupr_cli.errors import UsageError
    from dupr_cli.export.hub import check_options
    from dupr_cli.export.types import PushOptions
    from dupr_cli.recipe import ExportRecipe, load_recipe

    if check and (to or out or push_to_hub or dry_run):
        raise UsageError("--check writes nothing: give it without --to, --out, --push-to-hub.")
    push = None
    if push_to_hub:
        push = PushOptions(push_to_hub, private, revision, commit_message, token_from_env)
        check_options(push)
    options = overrides(
        set_,
        to=("formats", json.dumps(to) if to else None),
        encoder=("encoder", encoder),
        dtype=("dtype", dtype),
    )
    resolved = load_recipe(ExportRecipe, recipe or "default", options)
    if check:
        return stage.check(resolved, weights, check)
    if dry_run:
        return Planned(resolved, stage.plan(resolved, weights, out, push, overwrite=overwrite))
    return stage.run(
        resolved,
        weights,
        out,
        push=push,
        local_only=local_only,
        results=results or (),
        overwrite=overwrite,
        reporter=reporter,
    )


def show(result: ExportResult | Checked) -> None:
    from dupr_cli.cli.console import print_facts, print_text
    from dupr_cli.export.arrival import Checked

    if isinstance(result, Checked):
        print_facts([(found.detector, _arrived(found)) for found in result.arrivals])
        return
    facts = [
        ("written to", result.path),
        (
            "weights",
            f"{result.architecture}, {result.origin}, {result.tensors} tensors, {result.dtype}",
        ),
    ]
    for each in result.formats:
        checked = "features differ by" if each.features_compared else "tensors differ by"
        difference = f"{checked} {each.max_difference:.1e} at most, {each.verified_by}"
        facts.append((each.name, difference))
        for name, digest in each.files.items():
            path = f"{result.path}/{name}" if Path(result.path).is_dir() else result.path
            facts.append(("", f"{path} sha256 {digest}"))
    if result.hub_url:
        facts.append(("on the Hub", result.hub_url))
    print_facts(facts)
    for each in result.formats:
        for _, block in each.usage:
            print_text(f"\n{each.name}:\n{block}\n")


def following(result: ExportResult | Checked, arguments: Mapping[str, object]) -> str | None:
    from dupr_cli.export.arrival import Checked

    if isinstance(result, Checked):
        return None
    repository = arguments["push_to_hub"]
    if repository and arguments["local_only"]:
        return (
            f"the same command without --local-only pushes {result.path} to {repository}; nothing "
            f"was pushed yet"
        )
    compared = shell_words("dupr", "evaluate", "voc", arguments["weights"], "none", "--frozen")
    return f"{compared} --data VOC_TREE --out RESULTS"


def _arrived(found: Arrival) -> str:
    left_out = f", {len(found.left_out)} norms of unused levels left out" if found.left_out else ""
    compared = "no features compared, because a file computes none"
    if found.levels:
        levels = f"{found.levels[0]} to {found.levels[-1]}"
        compared = f"features of {levels} differ by {found.max_difference:.1e} at most"
    return (
        f"{found.tensors} of {found.tensors} tensors at {found.place or 'the top'}, in the names "
        f"of {found.names}{left_out}; {compared}"
    )
