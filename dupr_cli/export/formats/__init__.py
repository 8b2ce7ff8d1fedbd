"""Export formats: one module per framework, each found by its name.

A format writes files into a folder and reads them back; verification.py does the rest.
Other packages add theirs through the entry point group `dupr.export_formats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from dupr_cli.artifacts.pixel_formats import described
from dupr_cli.artifacts.weights import Weights
from dupr_cli.errors import UsageError
from dupr_cli.plugins import EXPORT_FORMATS, load_plugin, plugin_names
from dupr_cli.recipe.base import Level

__all__ = [
    "ExportFormat",
    "Features",
    "HubFolder",
    "LibraryMissingError",
    "Loaded",
    "LoadedByName",
    "folders_of",
    "make_format",
    "require_rgb",
]

Features = Mapping[Level, Tensor]


class LibraryMissingError(Exception):
    """The file cannot be loaded into the framework; the message says why: `X is not installed`."""


@dataclass(frozen=True)
class Loaded:
    """The framework's result for the files: feature maps of the levels that it supports.

    by: library and version.
    """

    features: Features
    by: str


@dataclass(frozen=True)
class HubFolder:
    """The place of a format's files on the Hub.

    revision: a branch, or None for the main one. folder: with its slash, or empty for the top.
    """

    repository: str
    revision: str | None
    folder: str


class ExportFormat(Protocol):
    """A layout of weights.

    Instances are made without arguments, before anything is written; the constructor may raise
    UsageError when a requirement of the layout is missing.
    top: its loader looks only at the top of a Hub repository, not in a folder.
    """

    name: str
    top: bool

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        """Write the files into an empty folder, without subfolders.

        license_name: of the weights, for layouts that state it. Raises UsageError for networks that
        the layout cannot hold.
        """
        ...

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        """Load the files strictly, as users would, and compute features in evaluation mode.

        images: (N, C, H, W), normalised. Raises LibraryMissingError, or RunError on refusal.
        """
        ...

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        """The files' tensors under torchvision's names, for when the framework is not installed.

        Raises RunError when names or shapes differ from those of the framework's network.
        """
        ...

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        """How to use the files in `place`: pairs of a language (python, yaml, text) and a block."""
        ...


@runtime_checkable
class LoadedByName(Protocol):
    """A format that Python loads by the name of a Hub repository, without a download by hand."""

    def hub_usage(self, weights: Weights, hub: HubFolder) -> Sequence[tuple[str, str]]:
        """As `ExportFormat.usage`, for the files on the Hub."""
        ...


def make_format(name: str) -> ExportFormat:
    """Raises UsageError for an unknown name, or a missing library."""
    if name not in plugin_names(EXPORT_FORMATS):
        raise UsageError(
            f"--to {name}: this format does not exist; the formats are "
            f"{', '.join(plugin_names(EXPORT_FORMATS))}. (recipe key: formats)"
        )
    return cast("type[ExportFormat]", load_plugin(EXPORT_FORMATS, name))()


def require_rgb(weights: Weights, name: str) -> None:
    """Raises UsageError for weights of images that are not RGB of 8 bits. name: of the format."""
    pixels = weights.metadata.input.pixels
    if pixels is not None:
        raise UsageError(
            f"--to {name}: its loaders read RGB of 8 bits, but the weights take "
            f"{described(pixels)}. Give --to {weights.metadata.layout} or onnx."
        )


def folders_of(formats: Sequence[ExportFormat]) -> dict[str, str]:
    """The folder of each format by name; a single one, or one that requires it, is at the top."""
    return {f.name: "" if f.top or len(formats) == 1 else f"{f.name}/" for f in formats}
