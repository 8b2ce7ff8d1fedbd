"""Output folders: locking them for one writer, examining their content, and removing files.

Every command that writes a folder does so inside `writing`, which holds a lock until the end, so
that an output has one writer. Examining (`holds`, `differences`) never changes a byte, and a dry
run does nothing else; claiming and clearing are separate functions. Only files that the command's
own record lists are ever removed, one by one (`remove`). All other files in the folder stay.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dupr_cli import __version__
from dupr_cli.artifacts.files import is_temporary, remove_leftovers, write_json
from dupr_cli.artifacts.versions import check_version
from dupr_cli.errors import UsageError
from dupr_cli.parsing import parse_json, read_json

if TYPE_CHECKING:
    import torch

LOCK = ".dupr.lock"
RESULT_FILE = "result.json"
FORMAT_VERSION = 1

# Folders that this process writes to: the kernel's lock does not exclude threads of one process.
_held: set[str] = set()


@contextmanager
def writing(out: Path, command: str, *, shared: bool = False) -> Iterator[None]:
    """Be the only writer of the folder `out`, which is created if it is missing.

    command: named in the message to a second process. shared: other processes that also share may
    write, as the tasks of one preparation do. A folder that was created here and stayed empty is
    removed. The kernel releases the lock when this process ends in any way; forked workers do not
    hold it. Raises UsageError when `out` is a file or another process writes to it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, but the output must be a folder.")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    place = os.path.realpath(out)
    if place in _held:
        raise UsageError(f"{out}: this process is already writing to it.")
    descriptor = _lock(out, command, shared)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        if not shared:
            (out / LOCK).unlink(missing_ok=True)
        os.close(descriptor)  # releases the lock
        if made and not shared and not holds_anything(out):
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
                out.rmdir()


def _lock(out: Path, command: str, shared: bool) -> int:
    path = out / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return descriptor  # some cluster file systems have no locks
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise UsageError(
                f"{out}: {_describe(holder)} is writing to it. Wait until it ends, stop it, or "
                f"give another output."
            ) from None
        # The previous holder may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)
    record = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    return descriptor


def _describe(record: bytes) -> str:
    try:
        holder = parse_json(record)
        return f"process {holder['pid']} on {holder['host']} (`{holder['command']}`)"
    except (ValueError, TypeError, KeyError):  # the record is being written right now
        return "another process of dupr"


def holds_anything(out: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything except the lock, dupr's temporary files, and `besides`."""
    if not out.is_dir():
        return False
    return any(
        path.name != LOCK and path.name not in besides and not is_temporary(path.name)
        for path in out.iterdir()
    )


def holds(out: Path, markers: Iterable[str], what: str) -> bool:
    """Whether the folder `out` holds an output of this kind, which `markers` identify.

    Raises UsageError when `out` is a file, or a folder with other content. Changes nothing.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, but the output must be a folder.")
    if any((out / name).exists() for name in markers):
        return True
    if holds_anything(out):
        raise UsageError(f"{out}: the folder is not empty and holds no {what}. Give another --out.")
    return False


def require_own(out: Path, record: str, keys: Collection[str], what: str) -> None:
    """Raises UsageError unless `out` is empty or holds an earlier output of this kind.

    record: name of the JSON file that marks such an output and has at least these `keys`.
    """
    if not holds(out, [record], what):
        return
    try:
        values = read_json(out / record)
        own = values.keys() >= set(keys)
    except (OSError, ValueError, AttributeError):
        own = False
    if not own:
        raise UsageError(f"{out}: its {record} does not belong to {what}. Give another --out.")


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    """The differences between two records, as one line of text per key."""
    plain = json.loads(json.dumps(dict(now)))
    return {
        key: f"{key}: {_brief(before.get(key))} there, {_brief(plain.get(key))} now"
        for key in sorted(before.keys() | plain.keys())
        if before.get(key) != plain.get(key)
    }


def _brief(value: object) -> str:
    """A value for a message; long values such as digests are shortened."""
    text = str(value)
    return text if len(text) < 64 else text[:12] + "..."


def remove(out: Path, files: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Delete `files` below `out` in this order, then the folders that are left empty.

    folders: further folders of dupr, which are also deleted if they are empty.
    """
    folders = set(folders)
    for path in files:
        path.unlink(missing_ok=True)
        folders |= {parent for parent in path.parents if out in parent.parents}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # it is missing, or holds files that are not dupr's
            folder.rmdir()


@dataclass(frozen=True)
class Claim:
    """The record of an output of several weights, which identifies what the output is.

    file: name of the record file. what: the kind of output, for messages. fingerprint: the values,
    by recipe key or name, that must be equal for results to be comparable. folders: one per
    weights. defaults: of keys that the record of an older dupr may lack.
    """

    file: str
    what: str
    fingerprint: Mapping[str, object]
    folders: Collection[str]
    defaults: Mapping[str, object] = field(default_factory=dict)

    def check(self, out: Path) -> list[str] | None:
        """The folders recorded in `out` if it is this output, or None if it has no record yet.

        Raises UsageError when `out` holds something else. Changes nothing.
        """
        if not holds(out, [self.file], self.what):
            return None
        before, folders = read_claim(out / self.file)
        missing = {k: v for k, v in self.defaults.items() if k in self.fingerprint}
        changed = differences({**missing, **before}, self.fingerprint)
        if changed:
            raise UsageError(
                f"{out} holds {self.what} results that would not be comparable:\n"
                + "\n".join(f"  {line}" for line in changed.values())
                + "\nGive the same recipe and data to continue, another --out, or --overwrite to "
                "replace them."
            )
        return folders

    def take(self, out: Path, overwrite: bool, files_of: Callable[[Path], Iterable[Path]]) -> None:
        """Claim `out` for this output, or confirm that it is already claimed for it.

        files_of: lists the files of an output of this kind by its own record, which comes last;
        `overwrite` removes these and no others. Raises UsageError like `check`.
        """
        recorded: list[str] = []
        if overwrite and holds(out, [self.file], self.what):
            remove(out, files_of(out))
        else:
            recorded = self.check(out) or []
        remove_leftovers(out)
        write_json(
            out / self.file,
            {
                "format_version": FORMAT_VERSION,
                "dupr_version": __version__,
                "fingerprint": dict(self.fingerprint),
                "folders": sorted({*recorded, *self.folders}),
            },
        )


def read_claim(path: Path) -> tuple[dict[str, object], list[str]]:
    """Fingerprint and folders of a claim. Raises UsageError when it is damaged or too new.

    A claim of an older dupr consists of the fingerprint only and lists no folders.
    """
    try:
        values = dict(read_json(path))
        if "fingerprint" not in values:
            return dict(values), []
        check_version(values.get("format_version"), FORMAT_VERSION, path)
        fingerprint, folders = dict(values["fingerprint"]), [str(v) for v in values["folders"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: the record is damaged ({error}). Restore it, or replace the output with "
            f"--overwrite."
        ) from error
    return fingerprint, folders


def read_result(
    folder: Path, fingerprint: Mapping[str, object], address: str
) -> dict[str, Any] | None:
    """The result that an earlier call recorded in `folder`, or None if it did not finish.

    address: of the weights, for messages. Raises UsageError when the record is damaged or has
    another fingerprint.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        values = dict(read_json(path))
        check_version(values.get("format_version"), FORMAT_VERSION, path)
        same = values["fingerprint"] == json.loads(json.dumps(dict(fingerprint)))
    except (ValueError, TypeError, KeyError) as error:
        raise damaged_result(folder, error) from error
    if not same:
        raise UsageError(
            f"{folder}: the existing result belongs to other weights than {address} has now. Give "
            f"another --out, or --overwrite to replace it."
        )
    return values


def damaged_result(folder: Path, error: Exception) -> UsageError:
    """The error for a finished result that cannot be read."""
    return UsageError(
        f"{folder}: the existing result is damaged ({error}). Delete the folder, or use "
        f"--overwrite."
    )


def write_result(
    folder: Path, fingerprint: Mapping[str, object], values: Mapping[str, object]
) -> None:
    """Record in `folder` that its work is finished; all other files must be written first."""
    record = {"format_version": FORMAT_VERSION, "fingerprint": dict(fingerprint), **values}
    write_json(folder / RESULT_FILE, record)


def environment(device: torch.device | None = None, processes: int = 1) -> dict[str, object]:
    """The versions and the machine with which a result is made."""
    import torch
    import torchvision

    cuda = device.type == "cuda" if device else torch.cuda.is_available()
    return {
        "dupr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
