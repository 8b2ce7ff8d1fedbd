"""What people have, as sources: one class per kind behind one protocol (`base.ImageSource`).

Each is reachable by its name, as are those of other packages (entry point group `dupr.sources`);
without a name, the first that recognises the address is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from dupr_cli.artifacts.files import IMAGE_SUFFIXES
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.errors import UsageError
from dupr_cli.plugins import SOURCES, load_plugin
from dupr_cli.prepare.sources.base import BuiltIn, Entry, ImageSource, RawImage
from dupr_cli.recipe.prepare import SourceSection

__all__ = ["Entry", "ImageSource", "RawImage", "make_source", "recognise"]

# The more a kind asks of a folder, the earlier it is asked.
_ORDER = ("hf", "list", "voc", "coco", "yolo", "archive", "shards", "classes", "folder")


def recognise(address: str) -> str:
    """The kind of source that an address is. Raises UsageError when it is none or not there."""
    path = Path(address)
    if not is_remote(address) and "{" not in address and not path.exists():
        raise UsageError(f"{address}: there is no such file or folder.")
    if path.is_dir() and _is_empty(path):
        raise UsageError(f"{address}: the folder is empty.")
    for kind in _ORDER:
        if cast(type[BuiltIn], load_plugin(SOURCES, kind)).recognises(address):
            return kind
    raise UsageError(
        f"{address}: not a source that dupr knows: a folder of images, archives (.tar, .tar.gz, "
        f".zip), WebDataset shards, a VOC tree, COCO's JSON, YOLO's labels, a list (.txt, .csv, "
        f".parquet), hf://owner/name. Say what it is with --set source.kind=KIND."
    )


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def make_source(kind: str, address: str, options: SourceSection, out: Path) -> ImageSource:
    """The source at an address. Raises UsageError when the package of its kind does not load."""
    make = cast(Callable[..., ImageSource], load_plugin(SOURCES, kind))
    return make(address, options, out)


def nothing_found(address: str) -> UsageError:
    """The error of a source without a single image."""
    return UsageError(
        f"{address}: there are no images in it, at any depth. Known suffixes: "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}."
    )
