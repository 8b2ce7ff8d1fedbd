"""Files at an address (http, https, or anything fsspec knows), through a cache on this machine.

A file is copied whole, to a temporary name, and gets its own when its length and, where it is
known, its sha256 are right. Requests that fail are repeated; processes that want the same file wait
for the one that fetches it. http and https need nothing but Python; other schemes go through
fsspec and the package it asks for (s3fs, gcsfs, ...).
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from filelock import FileLock

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.errors import DuprError, RunError, UsageError

T = TypeVar("T")

# 0.5 s, doubled each time, with jitter: a minute in all before a request is given up.
_ATTEMPTS, _FIRST_DELAY = 8, 0.5
_TIMEOUT_SECONDS = 60
_CHUNK = 1 << 20
# Answers that will be the same next time.
_FINAL = (400, 401, 403, 404, 405, 410, 414)


class AbsentError(Exception):
    """The server says that there is no such file, or that it is not ours to read."""


class _FailedError(Exception):
    """A request that may go well the next time."""


def is_remote(address: str) -> bool:
    return "://" in address


def cache_folder(address: str) -> Path:
    """Where copies of the files under `address` lie: $DUPR_CACHE, or ~/.cache/dupr/shards."""
    root = Path(os.environ.get("DUPR_CACHE") or Path.home() / ".cache" / "dupr" / "shards")
    place = re.sub(r"^[^/]*@", "", address.split("://", 1)[1])  # no user:password in a file name
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", place).strip("-")[-60:]
    return root / f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def once(path: Path, make: Callable[[], None], size: int | None = None) -> None:
    """Have `make` write the file at `path` in the cache, unless it is there.

    Other processes that want the same file wait. size: what a whole file has. Raises RunError when
    the cache cannot be written, and whatever `make` raises.
    """
    if _is_there(path, size):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if _is_there(path, size):  # another process was faster
                return
            # Nobody else writes now: what is half-written is from a process that was killed.
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
            make()
    except OSError as error:
        raise RunError(
            f"{error.filename or path}: {error.strerror or error}, while shards were copied into "
            f"the cache. Make room there, or set DUPR_CACHE to another folder; the same command "
            f"goes on."
        ) from error


def fetch(address: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copy the file at `address` to `path`, unless it is there.

    size, sha256: what it must have. Raises AbsentError when it does not exist, RunError when it
    cannot be had after all attempts or the cache cannot be written.
    """
    once(path, lambda: _repeat(address, lambda: _copy(address, path, size, sha256)), size)


def fetch_bytes(address: str, attempts: int = _ATTEMPTS) -> bytes:
    """All of a small file, never from the cache. Raises as `fetch`."""
    return _repeat(address, lambda: _read(address), attempts)


def _is_there(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def _copy(address: str, path: Path, size: int | None, sha256: str | None) -> None:
    with _requesting(address):
        source = _open(address)
    with source, atomic_file(path) as file:
        announced = _announced_length(source)
        if None not in (size, announced) and size != announced:
            raise _FailedError(f"it is {announced} bytes there, and should be {size}")
        digest, length = hashlib.sha256(), 0
        while True:
            # Only the request: an error of writing the copy is not the server's.
            with _requesting(address):
                chunk = source.read(_CHUNK)
            if not chunk:
                break
            digest.update(chunk)
            length += len(chunk)
            file.write(chunk)
        _check_length(length, announced if size is None else size)
        if sha256 and digest.hexdigest() != sha256:
            raise _FailedError("what came has another sha256 than the manifest says")


def _read(address: str) -> bytes:
    with _requesting(address), _open(address) as source:
        data, announced = source.read(), _announced_length(source)
    _check_length(len(data), announced)
    return data


def _check_length(length: int, expected: int | None) -> None:
    if expected is not None and length != expected:
        raise _FailedError(f"{length} bytes came instead of {expected}")


def _repeat(address: str, attempt: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
    problem = _FailedError("no attempt was made")
    for number in range(attempts):
        if number:
            time.sleep(_FIRST_DELAY * 2 ** (number - 1) * random.uniform(0.5, 1))
        try:
            return attempt()
        except _FailedError as error:
            problem = error
    raise RunError(
        f"{address} cannot be had: {problem} ({attempts} attempts). See that the server answers "
        f"and has the whole file, and give the same command again; it goes on."
    ) from problem


@contextmanager
def _requesting(address: str) -> Iterator[None]:
    """Tell failures of the other side apart: gone for good, or worth another attempt."""
    try:
        yield
    except DuprError:
        raise
    except urllib.error.HTTPError as error:
        answer = f"{error.code} {error.reason}"
        error.close()
        if error.code in _FINAL:
            raise AbsentError(f"{address}: {answer}") from error
        raise _FailedError(answer) from error
    except http.client.InvalidURL as error:
        raise UsageError(f"{address} is not an address: {error}.") from error
    except (FileNotFoundError, PermissionError) as error:
        raise AbsentError(f"{address}: {error}") from error
    except urllib.error.URLError as error:
        raise _FailedError(_words(error.reason)) from error
    except Exception as error:  # packages behind fsspec raise errors of their own
        raise _FailedError(_words(error)) from error


def _words(error: BaseException | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _announced_length(source: BinaryIO) -> int | None:
    """How long the file should be: a http connection that drops ends the body without a word."""
    headers = getattr(source, "headers", None)
    # Without headers it is a file of fsspec.
    length = str(headers.get("Content-Length") if headers else getattr(source, "size", None))
    return int(length) if length.isdecimal() else None


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
