"""Files at an address (http, https, or anything fsspec knows), through a cache on this machine.

A file is copied whole, to a temporary name, and gets its own when its length and, where it is
known, its sha256 are right. Requests that fail are repeated; processes that want the same file wait
for the one that fetches it. http and https need nothing but Python; other schemes go through
fsspec and the package it asks for (s3fs, gcsfs, ...).
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from filelock import FileLock

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.errors import RunError, UsageError

T = TypeVar("T")

# 0.5 s, doubled each time, with jitter: a minute in all before a request is given up.
_ATTEMPTS, _FIRST_DELAY = 8, 0.5
_TIMEOUT_SECONDS = 60
_CHUNK = 1 << 20
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Answers that will be the same next time.
_FINAL = (400, 401, 403, 404, 405, 410, 414)


class AbsentError(Exception):
    """The server says that there is no such file, or that it is not ours to read."""


def is_remote(address: str) -> bool:
    return "://" in address


def cache_folder(address: str) -> Path:
    """Where copies of the files under `address` lie: $DUPR_CACHE, or ~/.cache/dupr/shards."""
    root = Path(os.environ.get("DUPR_CACHE") or Path.home() / ".cache" / "dupr" / "shards")
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", address.split("://", 1)[1]).strip("-")[-60:]
    return root / f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def fetch(address: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copy the file at `address` to `path`, unless it is there.

    size, sha256: what it must have. Raises AbsentError when it does not exist, RunError when it
    cannot be had after all attempts or the cache cannot be written.
    """
    if _is_there(path, size):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not _is_there(path, size):  # another process may have been faster
                _fetch_patiently(address, path, size, sha256)
    except OSError as error:
        raise RunError(
            f"{error.filename or path}: {error.strerror or error}, while {address} was copied into "
            f"the cache. Give room, or set DUPR_CACHE to another folder; the same command goes on."
        ) from error


def fetch_text(address: str) -> str:
    """The text of a small file, never from the cache. Raises as `fetch`."""
    return _repeat(address, lambda: _read(address)).decode()


def _is_there(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def _fetch_patiently(address: str, path: Path, size: int | None, sha256: str | None) -> None:
    def attempt() -> None:
        digest, length = hashlib.sha256(), 0
        with atomic_file(path) as file, _open(address) as source:
            expected = _announced_length(source) if size is None else size
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                length += len(chunk)
                file.write(chunk)
            if expected is not None and length != expected:
                raise _BrokenError(f"{length} bytes came instead of {expected}")
            if sha256 and digest.hexdigest() != sha256:
                raise _BrokenError("what came has another sha256 than the manifest says")

    _repeat(address, attempt)


class _BrokenError(Exception):
    """What came is not the file."""


def _repeat(address: str, attempt: Callable[[], T]) -> T:
    problem: Exception | None = None
    for number in range(_ATTEMPTS):
        if number:
            time.sleep(_FIRST_DELAY * 2 ** (number - 1) * random.uniform(0.5, 1))
        try:
            return attempt()
        except (FileNotFoundError, PermissionError) as error:
            raise AbsentError(f"{address}: {error}") from error
        except urllib.error.HTTPError as error:
            if error.code in _FINAL:
                raise AbsentError(f"{address}: {error.code} {error.reason}") from error
            problem = error
        except (OSError, http.client.HTTPException, _BrokenError) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise  # this machine's disk, which will be as full the next time
            problem = error
    raise RunError(
        f"{address} cannot be had: {problem or 'no answer'} ({_ATTEMPTS} attempts). See that the "
        f"server answers, and give the same command again; it goes on."
    ) from problem


def _read(address: str) -> bytes:
    with _open(address) as source:
        data, expected = source.read(), _announced_length(source)
    if expected is not None and len(data) != expected:
        raise _BrokenError(f"{len(data)} bytes came instead of {expected}")
    return data


def _announced_length(source: BinaryIO) -> int | None:
    """Content-Length of a http answer: a connection that drops ends the body without a word."""
    headers = getattr(source, "headers", None)
    length = headers.get("Content-Length") if headers is not None else None
    return int(length) if length is not None else None


def _open(address: str) -> BinaryIO:
    if address.startswith(("http://", "https://")):
        return cast(BinaryIO, urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS))
    import fsspec

    try:
        # Not from fsspec's cache of connections: a forked process may not use its parent's.
        system, place = fsspec.url_to_fs(address, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{address}: {error}") from error
    return cast(BinaryIO, system.open(place, "rb"))


def _forget_parents_connections() -> None:
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:
        asyn.iothread[0] = asyn.loop[0] = None
        asyn.reset_lock()


# Loader processes are forks, in which the thread of fsspec's event loop does not live on.
os.register_at_fork(after_in_child=_forget_parents_connections)
