"""Reads the bytes of one image from a place that may hold something else.

A folder may contain a named pipe that is called x.jpg, and a server may send a body without end.
Whatever it finds, each function here returns or raises `UnfitImageError`, and reads no more than
`max_bytes` and one byte.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Protocol

from dupr_cli.errors import DuprError

_CHUNK = 1 << 20
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


class Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


def require_size(size: int, max_bytes: int) -> None:
    """Raises UnfitImageError for an image of more bytes than are allowed."""
    if size > max_bytes:
        raise UnfitImageError(f"too many bytes: {size}, more than source.max_bytes = {max_bytes}")


def read_whole(file: Readable, max_bytes: int, size: int | None = None) -> bytes:
    """All that a file or stream holds, unless that exceeds `max_bytes`.

    size: what it is said to hold, if anything; it may hold more or less.
    """
    if size is not None:
        require_size(size, max_bytes)
    parts, length = list[bytes](), 0
    # One byte more shows in a single read that an image of the stated size ends there.
    wanted = _CHUNK if size is None else size + 1
    while part := file.read(min(wanted, max_bytes + 1)):
        parts.append(part)
        length += len(part)
        if length > max_bytes:
            raise UnfitImageError(f"too many bytes: more than source.max_bytes = {max_bytes}")
        wanted = _CHUNK
    return b"".join(parts)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a file. Raises UnfitImageError unless it is regular and fits, and OSError."""
    size = require_regular(path)
    require_size(size, max_bytes)
    with path.open("rb", buffering=0) as file:
        return read_whole(file, max_bytes, size)
