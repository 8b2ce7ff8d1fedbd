"""Stage 3, `dupr export`: a run's backbone in the layout that a framework loads.

One module per layout (torchvision_layout.py); hub.py pushes a file with its model card. An export
is loaded back into the framework's own model and compared before it is said to be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dupr_cli.errors import UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import ExportRecipe


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do, before it does it."""

    weights: str
    architecture: str
    step: int
    format: str
    encoder: str
    out: str
    push_to_hub: str | None


@dataclass(frozen=True)
class ExportResult:
    """What was written. max_difference: largest deviation of features from dupr's own."""

    path: str
    format: str
    architecture: str
    tensors: int
    bytes: int
    sha256: str
    max_difference: float
    hub_url: str | None = None


def _output_path(out: Path) -> Path:
    return out / "backbone.safetensors" if out.is_dir() or not out.suffix else out


def plan(
    recipe: ExportRecipe, weights: str, out: Path, push_to_hub: str | None = None
) -> ExportPlan:
    """Check the weights and say what `run` would do. Raises UsageError."""
    from dupr_cli.artifacts.weights import read_weights

    read = read_weights(weights, recipe.encoder)
    return ExportPlan(
        weights=weights,
        architecture=read.metadata.architecture,
        step=read.metadata.step,
        format=recipe.format,
        encoder=recipe.encoder,
        out=str(_output_path(out)),
        push_to_hub=push_to_hub,
    )


def run(
    recipe: ExportRecipe,
    weights: str,
    out: Path,
    *,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Export the backbone of a run directory, checkpoint or weights file.

    out: a file, or a directory that gets backbone.safetensors. push_to_hub: OWNER/NAME.
    Raises UsageError for unreadable weights or a file in the way, RunError when the exported file
    does not load back as the same network or the push fails.
    """
    from dupr_cli.artifacts.files import sha256_file
    from dupr_cli.artifacts.weights import read_weights
    from dupr_cli.export import hub, torchvision_layout

    say = reporter or SilentReporter()
    path = _output_path(out)
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: a file is there. Give another --out, or --overwrite.")
    read = read_weights(weights, recipe.encoder)
    difference = torchvision_layout.write(read, path)
    say.detail(f"loaded back into torchvision: largest difference of features {difference:.1e}")
    url = hub.push(path, read, push_to_hub, say) if push_to_hub else None
    return ExportResult(
        path=str(path),
        format=recipe.format,
        architecture=read.metadata.architecture,
        tensors=len(read.tensors),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        max_difference=difference,
        hub_url=url,
    )
