"""Reads files at an address (http, https, or any scheme of fsspec) through a local cache.

A file is copied whole under a temporary name; it gets its final name when its length and, if
known, its sha256 are right. Its size, time and sha256 are recorded then; a copy that has another
size or time later is read again before it is used. Failed requests are repeated. Processes that
want the same file wait for the one that fetches it. http and https need only Python; other schemes
need fsspec and the package that it asks for (s3fs, gcsfs, ...). Messages and the names in the cache
have the public form of addresses (`dupr_cli.addresses`).
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import random
import re
import stat
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from filelock import FileLock

from dupr_cli.addresses import public_address, without_secrets
from dupr_cli.artifacts.files import atomic_file, sha256_file, write_json
from dupr_cli.artifacts.paced_http import Pace, open_http
from dupr_cli.artifacts.reading import read_whole
from dupr_cli.errors import DuprError, RunError, UsageError
from dupr_cli.parsing import ParseError, read_json, validated

T = TypeVar("T")

# 0.5 s, doubled each time, with jitter: a request is given up after about a minute.
_ATTEMPTS, _FIRST_DELAY = 8, 0.5
# Bytes per second of a shard, an index or a manifest, below which a request is repeated.
_LEAST_RATE = 1000
_CHUNK = 1 << 20
# HTTP answers that will be the same next time.
_FINAL = (400, 401, 403, 404, 405, 410, 414)


class AbsentError(Exception):
    """The server says that the file does not exist or may not be read."""


class _FailedError(Exception):
    """A failed request that may succeed next time."""


def is_remote(address: str) -> bool:
    return "://" in address


def cache_folder(address: str) -> Path:
    """The folder for copies of files under `address`, in $DUPR_CACHE or ~/.cache/dupr/shards."""
    public = public_address(address)
    place = public.split("://", 1)[1]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", place).strip("-")[-60:]
    return _cache_root() / f"{readable}-{hashlib.sha256(public.encode()).hexdigest()[:12]}"


def once(path: Path, make: Callable[[], None], is_whole: Callable[[], bool] = lambda: True) -> None:
    """Call `make` to write the file at `path` in the cache, unless it exists and is whole.

    Other processes that want the same file wait. Raises RunError when the cache cannot be written,
    UsageError when other users can write it, and whatever `make` raises.
    """
    try:
        _require_own_folders(path)
        if path.is_file() and is_whole():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and is_whole():  # another process was faster
                return
            # No other process writes now: a temporary file is left from one that was killed.
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
            make()
    except OSError as error:
        raise RunError(
            f"{error.filename or path}: {error.strerror or error}, while shards were copied into "
            f"the cache. Make room there, or set DUPR_CACHE to another folder, and give the same "
            f"command again to continue."
        ) from error


def fetch(address: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copy the file at `address` to `path`, unless `path` exists.

    size, sha256: of the file, if known. Raises AbsentError when `address` does not exist, RunError
    when all attempts fail or the cache cannot be written.
    """
    pace = Pace(_LEAST_RATE)

    def make() -> None:
        copy = partial(_copy, address, path, size, sha256, pace)
        _remember(path, _repeat(address, copy, _ATTEMPTS, pace))

    once(path, make, lambda: _is_unchanged(path, size, sha256))


def fetch_bytes(
    address: str,
    attempts: int = _ATTEMPTS,
    max_bytes: int = sys.maxsize - 1,
    pace: Pace | None = None,
) -> bytes:
    """The content of a file, never from the cache. pace: limits of http and https requests.

    Raises the same errors as `fetch`, and UnfitImageError when the file exceeds `max_bytes`.
    """
    given = pace or Pace(_LEAST_RATE)
    return _repeat(address, lambda: _read(address, max_bytes, given), attempts, given)


def _cache_root() -> Path:
    return Path(os.environ.get("DUPR_CACHE") or Path.home() / ".cache" / "dupr" / "shards")


def _require_own_folders(path: Path) -> None:
    """Raises UsageError when another user can put a file in the place of one in the cache.

    In a folder such as /tmp everyone may write, but nobody may replace what belongs to others (the
    sticky bit). There, a folder of another user may have been put in the way.
    """
    root, open_to_all = _cache_root(), False
    within = path.parent.relative_to(root).parts if path.is_relative_to(root) else ()
    for folder in [root, *(root.joinpath(*within[: n + 1]) for n in range(len(within)))]:
        if not folder.exists():
            return
        found = folder.stat()
        mine = found.st_uid == os.geteuid()
        shared = found.st_mode & (stat.S_IWOTH if mine else stat.S_IWOTH | stat.S_IWGRP)
        if shared and not found.st_mode & stat.S_ISVTX:
            reason = "other users may write in it"
        elif open_to_all and not mine and found.st_uid != 0:
            reason = "it belongs to another user, in a folder where everyone may write"
        else:
            open_to_all = bool(shared)
            continue
        raise UsageError(
            f"{folder}: the cache of shards is not used, because {reason} and could exchange the "
            f"shards. Take that right away (chmod go-w), or set DUPR_CACHE to a folder of your own."
        )


@dataclass(frozen=True)
class _Fetched:
    """What is known of a copy: the state of the file when it was written, and its sha256."""

    size: int
    mtime_ns: int
    sha256: str


def _record_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.fetched.json")


def _remember(path: Path, sha256: str) -> None:
    found = path.stat()
    with suppress(PermissionError):  # a cache that is filled and then made read-only
        record = _Fetched(found.st_size, found.st_mtime_ns, sha256)
        write_json(_record_of(path), asdict(record))


def _is_unchanged(path: Path, size: int | None, sha256: str | None) -> bool:
    """Whether a copy is what was fetched; it is read only if its size or time has changed."""
    found = path.stat()
    if size is not None and found.st_size != size:
        return False
    try:
        record = validated(_Fetched, read_json(_record_of(path)))
    except (OSError, ParseError):  # copied by a dupr that kept no record
        record = None
    if record is not None:
        same_file = (record.size, record.mtime_ns) == (found.st_size, found.st_mtime_ns)
        if same_file and sha256 in (None, record.sha256):
            return True
        sha256 = sha256 or record.sha256
    digest = sha256_file(path)
    if sha256 not in (None, digest):
        return False
    _remember(path, digest)
    return True


def _copy(address: str, path: Path, size: int | None, sha256: str | None, pace: Pace) -> str:
    """Copy a file to `path`; returns its sha256."""
    with _requesting(address):
        source = _open(address, pace)
    with source, atomic_file(path) as file:
        announced = _announced_length(source)
        if None not in (size, announced) and size != announced:
            raise _FailedError(f"the server has {announced} bytes instead of {size}")
        digest, length = hashlib.sha256(), 0
        while True:
            # Only the request is guarded: errors in writing the copy are not the server's fault.
            with _requesting(address):
                chunk = source.read(_CHUNK)
            if not chunk:
                break
            digest.update(chunk)
            length += len(chunk)
            file.write(chunk)
        _check_length(length, announced if size is None else size)
        if sha256 and digest.hexdigest() != sha256:
            raise _FailedError("the sha256 of the received file differs from the manifest")
    return digest.hexdigest()


def _read(address: str, max_bytes: int, pace: Pace) -> bytes:
    with _requesting(address), _open(address, pace) as source:
        announced = _announced_length(source)
        data = read_whole(source, max_bytes, announced)
    _check_length(len(data), announced)
    return data


def _check_length(length: int, expected: int | None) -> None:
    if expected is not None and length != expected:
        raise _FailedError(f"{length} bytes arrived instead of {expected}")


def _repeat(address: str, attempt: Callable[[], T], attempts: int, pace: Pace) -> T:
    problem, public = _FailedError("no attempt was made"), public_address(address)
    for number in range(attempts):
        if number:
            time.sleep(_FIRST_DELAY * 2 ** (number - 1) * random.uniform(0.5, 1))
        pace.begin_attempt()
        try:
            return attempt()
        except _FailedError as error:
            problem = error
        if pace.is_over:
            raise RunError(
                f"{public} cannot be fetched within {pace.max_seconds:g} s: {problem}."
            ) from problem
    raise RunError(
        f"{public} cannot be fetched: {problem} ({attempts} attempts). Check that the server "
        f"answers and has the whole file, then give the same command again to continue."
    ) from problem


@contextmanager
def _requesting(address: str) -> Iterator[None]:
    """Turn errors of a request into AbsentError (final) or _FailedError (worth another attempt)."""
    public = public_address(address)
    try:
        yield
    except DuprError:
        raise
    except urllib.error.HTTPError as error:
        # Not the server's own words, which may repeat the address.
        answer = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
        if 300 <= error.code < 400:
            endless = "infinite loop" in str(error.reason)
            answer += ", in an infinite loop" if endless else ", which cannot be followed"
        error.close()
        if error.code in _FINAL:
            raise AbsentError(f"{public}: {answer}") from error
        raise _FailedError(answer) from error
    except http.client.InvalidURL as error:
        # The error would quote a part of the address, such as a password in place of the port.
        raise UsageError(
            f"{public} is not an address of http: its port is no number, or it has a space or a "
            f"control character."
        ) from error
    except (FileNotFoundError, PermissionError) as error:
        raise AbsentError(f"{public}: {without_secrets(str(error))}") from error
    except urllib.error.URLError as error:
        raise _FailedError(_words(error.reason)) from error
    except Exception as error:  # packages behind fsspec raise errors of their own
        raise _FailedError(_words(error)) from error


def _words(error: BaseException | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return without_secrets(error.strerror)
    return without_secrets(str(error)) or type(error).__name__


def _announced_length(source: BinaryIO) -> int | None:
    """The expected length: when an HTTP connection drops, the body ends without an error."""
    headers = getattr(source, "headers", None)
    # A source without headers is a file of fsspec.
    length = str(headers.get("Content-Length") if headers else getattr(source, "size", None))
    return int(length) if length.isdecimal() else None


def _open(address: str, pace: Pace) -> BinaryIO:
    if address.startswith(("http://", "https://")):
        return open_http(address, pace)
    import fsspec

    try:
        # Skip fsspec's cache of connections: a forked process must not use those of its parent.
        system, place = fsspec.url_to_fs(address, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{public_address(address)}: {without_secrets(str(error))}") from error
    return cast(BinaryIO, system.open(place, "rb"))


def _forget_parents_connections() -> None:
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:
        asyn.iothread[0] = asyn.loop[0] = None
        asyn.reset_lock()


# Loader processes are forks, in which the thread of fsspec's event loop no longer runs.
os.register_at_fork(after_in_child=_forget_parents_connections)
