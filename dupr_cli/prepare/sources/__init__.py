"""The kinds of source: one class per kind, all behind one protocol (`base.ImageSource`).

Each kind is selected by its name; other packages add kinds through the entry point group
`dupr.sources`. Without a name, the first kind that recognises the address is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.files import IMAGE_SUFFIXES
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.errors import UsageError
from dupr_cli.plugins import SOURCES, load_plugin
from dupr_cli.prepare.sources.base import BuiltIn, Entry, ImageSource, RawImage
from dupr_cli.recipe.prepare import SourceSection

__all__ = ["Entry", "ImageSource", "RawImage", "make_source", "recognise"]

# Kinds with more specific requirements are tried first.
_ORDER = ("hf", "list", "voc", "coco", "yolo", "masks", "archive", "shards", "classes", "folder")


def recognise(address: str, advice: str = " Name the kind with --set source.kind=KIND.") -> str:
    """The kind of source at an address. Raises UsageError if it is unknown or does not exist.

    advice: how to name the kind, for the message.
    """
    path = Path(address)
    if not is_remote(address) and "{" not in address and not path.exists():
        raise UsageError(f"{address}: the file or folder does not exist.")
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise UsageError(f"{address}: neither a file nor a folder, but a pipe, socket or device.")
    if path.is_dir() and _is_empty(path):
        raise UsageError(f"{address}: the folder is empty.")
    for kind in _ORDER:
        if cast(type[BuiltIn], load_plugin(SOURCES, kind)).recognises(address):
            return kind
    raise UsageError(
        f"{public_address(address)}: the kind of source is not recognised. dupr reads a folder of "
        f"images, archives (.tar, .tar.gz, .zip), WebDataset shards, a VOC tree, COCO's JSON, "
        f"YOLO's labels, images with semantic masks, a list (.txt, .csv, .parquet), and hf://owner/name.{advice}"
    )


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def make_source(kind: str, address: str, options: SourceSection, out: Path) -> ImageSource:
    """The source at an address. Raises UsageError when the plugin of its kind cannot be loaded."""
    make = cast(Callable[..., ImageSource], load_plugin(SOURCES, kind))
    return make(address, options, out)


def nothing_found(address: str) -> UsageError:
    """The error for a source without any image."""
    return UsageError(
        f"{public_address(address)} holds no images at any depth. Known suffixes: "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}."
    )
