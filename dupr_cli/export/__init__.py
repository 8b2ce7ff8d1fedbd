"""Stage 3, `dupr export`: a run's backbone in the layouts that frameworks load.

One module per layout (formats/), each loaded back into its framework and compared before it is said
to be done (verification.py). hub.py pushes a folder of them in one commit, with the model card of
card.py. public_checkpoints.py goes the other way: `dupr import`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    ExportRecipe,
    Overrides,
    as_address,
    as_addresses,
    as_path,
    resolve_recipe,
)

if TYPE_CHECKING:
    from dupr_cli.artifacts.weights import Weights
    from dupr_cli.export.formats import ExportFormat

RECORD = "export.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class PushOptions:
    """Where a folder goes on the Hugging Face Hub. token_from: the token's environment variable."""

    repository: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    token_from: str | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do, before it does it."""

    weights: str
    architecture: str
    step: int
    formats: list[str]
    encoder: str
    dtype: str
    out: str
    push_to_hub: str | None


@dataclass(frozen=True)
class ExportedFormat:
    """files: sha256 by name. max_difference: of features from dupr's own, see `verification`.

    verified_by: what loaded the files. usage: pairs of a language and a block of code.
    """

    name: str
    files: dict[str, str]
    bytes: int
    max_difference: float
    verified_by: str
    features_compared: bool
    usage: list[tuple[str, str]]


@dataclass(frozen=True)
class ExportResult:
    """What was written. path: the file, or the folder of several. origin: encoder and step."""

    path: str
    weights: str
    architecture: str
    encoder: str
    step: int
    origin: str
    dtype: str
    tensors: int
    formats: list[ExportedFormat]
    hub_url: str | None = None


def plan(
    recipe: ExportRecipe | str | Path,
    weights: str | Path,
    out: str | Path | None = None,
    push: PushOptions | None = None,
    *,
    overrides: Overrides = (),
) -> ExportPlan:
    """Check the weights and say what `run` would do. Raises UsageError."""
    from dupr_cli.artifacts.weights import read_weights
    from dupr_cli.export.formats import make_format

    recipe = resolve_recipe(ExportRecipe, recipe, overrides)
    weights, out = as_address(weights, "weights"), None if out is None else as_path(out, "out")
    for name in recipe.formats:
        make_format(name)
    read = read_weights(weights, recipe.encoder)
    return ExportPlan(
        weights=weights,
        architecture=read.metadata.architecture,
        step=read.metadata.step,
        formats=recipe.formats,
        encoder=recipe.encoder,
        dtype=recipe.dtype,
        out=str(_output(recipe, out, push)),
        push_to_hub=push.repository if push else None,
    )


def _output(recipe: ExportRecipe, out: Path | None, push: PushOptions | None) -> Path:
    if out is not None:
        return out
    alone = recipe.formats == ["torchvision"] and push is None
    return Path("backbone.safetensors" if alone else "exported")


def run(
    recipe: ExportRecipe | str | Path,
    weights: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Overrides = (),
    push: PushOptions | None = None,
    dry_run: bool = False,
    results: Sequence[str | Path] = (),
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Export the backbone of a run directory, checkpoint or weights file.

    recipe, overrides: see `dupr_cli.recipe.given`.
    out: a folder, or a file for a single format that is one. push: also write the model card and
    what goes with it, and commit the folder; with dry_run it is only written. results: folders of
    evaluations for the card, beside those that lie next to the run.
    Raises UsageError for unreadable weights or a file in the way, RunError when what was written
    does not load back as the same network, then nothing is there, or when the push fails.
    """
    import shutil
    import tempfile

    from dupr_cli.artifacts.weights import load_backbone, read_weights
    from dupr_cli.export.formats import folders_of, make_format
    from dupr_cli.models.resnet import ResNetBackbone

    recipe = resolve_recipe(ExportRecipe, recipe, overrides)
    weights, out = as_address(weights, "weights"), None if out is None else as_path(out, "out")
    given = [Path(folder) for folder in as_addresses(results, "results")]
    say = reporter or SilentReporter()
    target = _output(recipe, out, push)
    if target.is_file() and not overwrite:
        raise UsageError(f"{target}: a file is there. Give another --out, or --overwrite.")
    read = _rounded(read_weights(weights, recipe.encoder), recipe.dtype)
    load_backbone(ResNetBackbone(read.metadata.architecture), read)
    formats = [make_format(name) for name in recipe.formats]
    places = folders_of(formats)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        exported = []
        for chosen in formats:
            with say.task(f"export {chosen.name}", 1, "formats") as task:
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
        _write_record(staged / RECORD, result)
        if push is not None:
            from dupr_cli.export.card import write_companions

            write_companions(staged, result, read, recipe, push.repository, given)
        files = _move(staged, target, result, push is not None, overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if push is None or dry_run:
        return result
    from dupr_cli.export.hub import push_files

    return replace(result, hub_url=push_files(target, files, read, push, say))


def _rounded(weights: Weights, dtype: str) -> Weights:
    import torch

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
    """Written into a folder of its own and compared, then moved to its place in `staged`."""
    from dupr_cli.artifacts.files import sha256_file
    from dupr_cli.export.verification import verify

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


def _write_record(path: Path, result: ExportResult) -> None:
    from dupr_cli import __version__
    from dupr_cli.artifacts.files import write_json

    content = {k: v for k, v in asdict(result).items() if k not in ("path", "hub_url")}
    write_json(path, {"format_version": RECORD_VERSION, "dupr_version": __version__, **content})


def _move(
    staged: Path, target: Path, result: ExportResult, companions: bool, overwrite: bool
) -> list[str]:
    """Each file to its name, when all of them are whole; returns their names in the folder.

    Raises UsageError when one is there.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    alone = [name for of in result.formats for name in of.files]
    if len(alone) == 1 and not companions and target.suffix == Path(alone[0]).suffix:
        if target.is_dir():
            raise UsageError(f"{target}: a folder is there; give a file as --out.")
        moves = {staged / alone[0]: target, staged / RECORD: target.with_suffix(".export.json")}
    else:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target}: a file is there; give a folder as --out.")
        moves = {path: target / path.relative_to(staged) for path in files}
    present = [path for path in moves.values() if path.exists()]
    if present and not overwrite:
        raise UsageError(f"{present[0]}: a file is there. Give another --out, or --overwrite.")
    for source, destination in moves.items():
        destination.parent.mkdir(parents=True, exist_ok=True)
        source.replace(destination)
    return [path.relative_to(staged).as_posix() for path in files]
