"""Reads the bytes of one image from a place that may hold something else.

A folder may contain a named pipe that is called x.jpg, and a link may lead to an endless device.
Whatever it finds, each function here returns or raises `UnfitImageError`.
"""

from __future__ import annotations

import stat
from pathlib import Path

from dupr_cli.errors import DuprError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnfitImageError(DuprError):
    """Why something is not read as an image; the message is the whole reason."""


def require_regular(path: Path) -> int:
    """The size of a regular file, or of the one that a link leads to, without opening it.

    Opening a named pipe would wait for a writer, and opening a device may change it. Raises
    UnfitImageError for anything else, OSError when there is nothing.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "of an unknown type")
        raise UnfitImageError(f"not a regular file: {kind}")
    return found.st_size


def read_regular(path: Path) -> bytes:
    """The content of a file. Raises UnfitImageError unless it is regular, and OSError."""
    require_regular(path)
    return path.read_bytes()
