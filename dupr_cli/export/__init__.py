"""Stage 3, `dupr export`: a run's backbone in the layouts that frameworks load.

formats/ has one module per layout. Each layout is loaded back into its framework and compared
before the export succeeds (verification.py). `load_into` puts a backbone into a live detector and
proves that it arrived (arrival.py); `check` does so for names, folders and files (target.py).
hub.py pushes the exported folder in one commit, with the model card of card.py.
public_checkpoints.py does the reverse: `dupr import`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dupr_cli.artifacts.files import naming, remove_abandoned, sha256_file, temporary_name
from dupr_cli.artifacts.weights import Weights, read_weights
from dupr_cli.export.arrival import Checked, load_into
from dupr_cli.export.formats import ExportFormat, folders_of, make_format
from dupr_cli.export.hub import push_files
from dupr_cli.export.record import place, require_replaceable, write_record
from dupr_cli.export.target import check_in
from dupr_cli.export.types import ExportedFormat, ExportPlan, ExportResult, PushOptions
from dupr_cli.export.verification import verify
from dupr_cli.models.backbone import fitted
from dupr_cli.plugins import EXPORT_FORMATS, is_plugin
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    ExportRecipe,
    Overrides,
    as_address,
    as_addresses,
    as_path,
    resolve_recipe,
)
from dupr_cli.runtime.stopping import deferred, stoppable

__all__ = ["check", "load_into", "plan", "run"]


def plan(
    recipe: ExportRecipe | str | Path,
    weights: str | Path,
    out: str | Path | None = None,
    push: PushOptions | None = None,
    *,
    overrides: Overrides = (),
    overwrite: bool = False,
) -> ExportPlan:
    """Check the weights and return the plan of `run`. Nothing is changed. Raises UsageError."""

    recipe = resolve_recipe(ExportRecipe, recipe, overrides)
    weights, out = as_address(weights, "weights"), None if out is None else as_path(out, "out")
    for name in recipe.formats or []:
        make_format(name)
    read = read_weights(weights, recipe.encoder)
    formats = recipe.formats or [_own_format(read)]
    if (target := _output(formats, out, push)).is_file():
        require_replaceable(target, [target], overwrite)
    return ExportPlan(
        weights=weights,
        architecture=read.metadata.architecture,
        step=read.metadata.step,
        formats=formats,
        encoder=recipe.encoder,
        dtype=recipe.dtype,
        out=str(target),
        push_to_hub=push.repository if push else None,
    )


def _own_format(weights: Weights) -> str:
    """The layout of the network's own library; a plain file for those of other packages."""
    layout = weights.metadata.layout
    return layout if is_plugin(EXPORT_FORMATS, layout) else "safetensors"


def _output(formats: Sequence[str], out: Path | None, push: PushOptions | None) -> Path:
    if out is not None:
        return out
    alone = formats in (["torchvision"], ["safetensors"]) and push is None
    return Path("backbone.safetensors" if alone else "exported")


def run(
    recipe: ExportRecipe | str | Path,
    weights: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Overrides = (),
    push: PushOptions | None = None,
    local_only: bool = False,
    results: Sequence[str | Path] = (),
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Export the backbone of a run directory, checkpoint or weights file.

    recipe, overrides: see `dupr_cli.recipe.given`.
    out: a folder, or a file for a single-file format. push: also write the model card and its
    companions, and commit the folder; with local_only they are only written. results: folders of
    evaluations for the card, in addition to those next to the run. overwrite: replace the files
    that an earlier export recorded there, and no others.
    Raises UsageError for unreadable weights or a file in the way. Raises RunError when the written
    files do not load back as the same network (then nothing is left there), or when the push fails.
    """

    recipe = resolve_recipe(ExportRecipe, recipe, overrides)
    weights, out = as_address(weights, "weights"), None if out is None else as_path(out, "out")
    given = [Path(folder) for folder in as_addresses(results, "results")]
    reporter = reporter or SilentReporter()
    read = read_weights(weights, recipe.encoder)
    recipe = recipe.model_copy(update={"formats": recipe.formats or [_own_format(read)]})
    formats = [make_format(name) for name in recipe.formats or []]
    target = _output([chosen.name for chosen in formats], out, push)
    if target.is_file():
        require_replaceable(target, [target], overwrite)
    read = _rounded(fitted(read), recipe.dtype)
    places = folders_of(formats)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _on_its_file_system(target)
    remove_abandoned(beside)
    staged = temporary_name(beside)
    try:
        with naming(target):
            staged.mkdir()
        with stoppable("Nothing was written."):
            exported = []
            for chosen in formats:
                with reporter.task(f"export {chosen.name}", 1, "formats") as task:
                    exported.append(_export(chosen, read, staged, places[chosen.name], recipe))
                    task.advance()
            result = ExportResult(
                path=str(target),
                weights=weights,
                architecture=read.metadata.architecture,
                encoder=read.metadata.encoder,
                step=read.metadata.step,
                origin=read.metadata.origin,
                dtype=recipe.dtype,
                tensors=len(read.tensors),
                formats=exported,
            )
            if push is not None:
                from dupr_cli.export.card import write_companions

                of_formats = {chosen: places[chosen.name] for chosen in formats}
                write_companions(staged, result, read, recipe, push, of_formats, given)
                if recipe.card.license == "other" and not recipe.card.license_name:
                    reporter.warning(
                        "The model card states no licence, so nobody else may use the weights. "
                        "Give one, such as --set card.license=cc-by-4.0, or your own with "
                        "card.license_name and card.license_link."
                    )
            files = write_record(staged, result)
            with deferred():
                place(staged, target, result, push is not None, overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    result = replace(
        result,
        formats=[
            replace(each, usage=_usage_from_here(chosen, each, read, target, places[each.name]))
            for chosen, each in zip(formats, result.formats, strict=True)
        ],
    )
    if push is None or local_only:
        return result

    return replace(result, hub_url=push_files(target, files, read, push, reporter))


def _on_its_file_system(target: Path) -> Path:
    """A path beside which files can be renamed to be at the target or in it.

    That is inside the target if it is a file system of its own, or a link to a folder of another.
    """
    apart = target.is_dir() and target.stat().st_dev != target.parent.stat().st_dev
    return target / target.name if apart else target


def check(
    recipe: ExportRecipe | str | Path,
    weights: str | Path,
    detectors: Sequence[str],
    *,
    overrides: Overrides = (),
) -> Checked:
    """Whether the backbone arrives in each detector, or is there; see `target.check_in`.

    Nothing is written. Raises UsageError when a detector has no place for it, RunError when it
    holds or computes something else.
    """
    recipe = resolve_recipe(ExportRecipe, recipe, overrides)
    read = fitted(read_weights(as_address(weights, "weights"), recipe.encoder))
    read = _rounded(read, recipe.dtype)
    return Checked(str(weights), [check_in(detector, read) for detector in detectors])


def _rounded(weights: Weights, dtype: str) -> Weights:

    wanted = getattr(torch, dtype)
    return replace(
        weights,
        tensors={
            name: tensor.to(wanted) if tensor.is_floating_point() else tensor
            for name, tensor in weights.tensors.items()
        },
    )


def _export(
    chosen: ExportFormat, weights: Weights, staged: Path, place: str, recipe: ExportRecipe
) -> ExportedFormat:
    """Write into a separate folder and compare, then move the files to their place in `staged`."""

    folder = staged / f".{chosen.name}.tmp"
    folder.mkdir()
    chosen.write(weights, folder, recipe.card.license)
    verified = verify(chosen, weights, folder)
    (staged / place).mkdir(exist_ok=True)
    files, size = {}, 0
    for file in sorted(folder.iterdir()):
        files[f"{place}{file.name}"] = sha256_file(file)
        size += file.stat().st_size
        file.replace(staged / place / file.name)
    folder.rmdir()
    return ExportedFormat(
        chosen.name,
        files,
        size,
        verified.max_difference,
        verified.by,
        verified.features_compared,
        [*chosen.usage(weights, place)],
    )


def _usage_from_here(
    chosen: ExportFormat, exported: ExportedFormat, weights: Weights, target: Path, place: str
) -> list[tuple[str, str]]:
    """The usage with paths that hold where the command was given; a card's are those in the folder.

    target: the written file or folder. place: the folder of the format's files in it.
    """
    if target.is_dir():
        return [*chosen.usage(weights, f"{target}/{place}")]
    (name,) = exported.files
    blocks = chosen.usage(weights, "")
    return [(language, block.replace(name, str(target))) for language, block in blocks]
