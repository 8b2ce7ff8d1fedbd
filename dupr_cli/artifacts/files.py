"""Writes files atomically, so that a name that exists always stands for a whole file.

Each file is written under a temporary name in the same folder, flushed to disk and renamed.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dupr_cli.outside_text import json_text

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_KNOWN = """
    .jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm
    .avif .jp2 .tga
"""
IMAGE_SUFFIXES = frozenset(_KNOWN.split())


def fsync_directory(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the path in errors of writing, which otherwise name no file or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(temporary_name(path))):
            error.filename = str(path)
        raise


@functools.cache
def _host() -> int:
    """The machine, and the container on it, within which a process number means one process."""
    containers = Path("/proc/self/ns/pid")
    inside = containers.stat().st_ino if containers.exists() else ""
    return zlib.crc32(f"{socket.gethostname()}{inside}".encode())


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, on any machine that sees the folder."""
    return path.with_name(f".{path.name}.{_host()}{os.getpid():07d}.tmp")


def remove_abandoned(path: Path) -> None:
    """Delete temporary files and folders for `path` whose processes, on this machine, have ended.

    For outputs in folders that are not dupr's alone, where another process may be at work.
    """
    start = f".{path.name}.{_host()}"
    for place in path.parent.glob(f"{glob.escape(start)}*.tmp"):
        number = place.name.removeprefix(start).removesuffix(".tmp")
        # Seven digits: with more, they begin with another machine's number.
        if re.fullmatch(r"\d{7}", number) and not _runs(int(number)):
            _delete(place)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` only if the block ends without an error."""
    temporary = temporary_name(path)
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def shared_mode(path: Path) -> Iterator[None]:
    """Let the block write `path` with a library that makes files readable only to their owner.

    The file gets the mode that the umask gives, like all other files.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json_text(value, indent=1) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` with its files only if the block ends without an error."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with naming(path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def named(folder: Path, matches: Callable[[str], bool]) -> list[Path]:
    """The entries of a folder whose names match, sorted by name.

    Unlike `Path.iterdir` and `glob`, this never holds all names of a huge folder in memory.
    """
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if matches(entry.name))


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: by its suffix, in any case, and not hidden."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    return bool(stem) and not base.startswith(".") and dot + suffix.lower() in IMAGE_SUFFIXES


def is_array_name(name: str) -> bool:
    """Whether a file name is that of a NumPy array, which holds an image of several channels."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(".npy") and not base.startswith(".")


def is_possible_path(text: str) -> bool:
    """Whether a file of this path can exist; looking for others raises errors of its own."""
    raw = text.encode(errors="replace")
    return len(raw) < 4096 and b"\0" not in raw and all(len(p) < 256 for p in raw.split(b"/"))


def is_present(path: Path) -> bool:
    """Whether a file exists; false for a path that none can have, such as a name out of an
    annotation that is too long, where `is_file` would raise."""
    return is_possible_path(str(path)) and path.is_file()


def leads_outside(name: str) -> bool:
    """Whether a name that an artifact gives to a file in its own folder is none of such a file."""
    path = PurePosixPath(name)
    return not path.name or path.is_absolute() or ".." in path.parts or not is_possible_path(name)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(name: str) -> bool:
    """Whether `atomic_file` or `atomic_directory` of any process made this name."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed process left in `folder`."""
    for path in named(folder, is_temporary):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
