"""The record of a set's source: OUT/source.jsonl.gz, one line for each image of the source.

    [split, name, stamp]

An address is recorded, and compared, in its public form.
The stamp decides whether an image is unchanged. It is the size and modification time, or, with
`source.identity: content`, the sha256 of the bytes and labels. The record distinguishes a source
that has grown from one that has changed, so that only new images are added.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dupr_cli.addresses import public_address
from dupr_cli.errors import DuprError, UsageError
from dupr_cli.parsing import parse_json, validated
from dupr_cli.prepare.sources import Entry, ImageSource
from dupr_cli.prepare.sources.base import name_bytes

SOURCE = "source.jsonl.gz"
_KINDS = ("new", "changed", "missing")
_NAMED = 3  # number of names that a message gives as examples


class SourceDigest:
    """Identity of a source: a digest of its names, splits and stamps, in order.

    entries: number of images by split. names_alone: the digest that dupr 0.1 recorded. whole: that
    of whole addresses, which was recorded before they got a public form.
    """

    def __init__(self) -> None:
        self._hash, self._whole, self._names = (hashlib.sha256() for _ in range(3))
        self.entries = dict[str, int]()

    def add(self, entry: Entry) -> None:
        name, stamp = _name(entry.split, entry.name), entry.stamp.encode()
        public = _name(entry.split, public_address(entry.name))
        self._names.update(name + b"\n")
        self._whole.update(name + b"\n" + stamp + b"\n")
        self._hash.update(public + b"\n" + stamp + b"\n")
        self.entries[entry.split] = self.entries.get(entry.split, 0) + 1

    @property
    def names_alone(self) -> str:
        return self._names.hexdigest()

    @property
    def whole(self) -> str:
        return self._whole.hexdigest()

    def __str__(self) -> str:
        return self._hash.hexdigest()


def stamp_of_content(source: ImageSource, entry: Entry) -> str:
    """sha256 of an image's bytes and labels, or "unreadable" if it cannot be read."""
    try:
        raw = source.read(entry)
    except (OSError, DuprError):
        return "unreadable"
    boxes = None if raw.boxes is None else [box.to_json() for box in raw.boxes]
    known = [boxes, raw.label, raw.size, dict(raw.info)]
    digest = hashlib.sha256(raw.data)
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    if raw.mask is not None:
        digest.update(raw.mask.tobytes())
    for suffix, data in sorted(raw.extras.items()):
        digest.update(suffix.encode() + data)
    return f"sha256:{digest.hexdigest()}"


class SourceRecordWriter:
    """Writes the record, one entry at a time; the same entries give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._packed = gzip.GzipFile("", "wb", 6, self._file, mtime=0)

    def add(self, entry: Entry) -> None:
        # File names are bytes; those that are not UTF-8 are kept as escapes.
        values = [entry.split, public_address(entry.name), entry.stamp]
        line = json.dumps(values, separators=(",", ":"))
        self._packed.write(line.encode() + b"\n")

    def close(self) -> None:
        self._packed.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_record(path: Path) -> Iterator[tuple[str, str, str]]:
    """(split, name, stamp) of each image. Raises UsageError when the record is damaged."""
    try:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                split, name, stamp = validated(tuple[str, str, str], parse_json(line))
                yield split, name, stamp
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: the record of the source is damaged ({error}). Restore it, or make the set "
            f"again with --overwrite."
        ) from error


@dataclass
class SourceChanges:
    """How a source differs from the record: number of images and first names of each kind."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        names: list[str] = getattr(self, kind)
        if len(names) < _NAMED:
            names.append(public_address(name))

    def describe(self, *kinds: str) -> str:
        """`3 are new (a.jpg, b.jpg, c.jpg), 1 has changed (d.jpg)`."""
        words = {"new": ("is new", "are new"), "changed": ("has changed", "have changed"),
                 "missing": ("is gone", "are gone")}  # fmt: skip
        parts = []
        for kind in kinds or _KINDS:
            if count := self.counts[kind]:
                names: list[str] = getattr(self, kind)
                more = ", ..." if count > len(names) else ""
                parts.append(f"{count} {words[kind][count > 1]} ({', '.join(names)}{more})")
        return ", ".join(parts)


class KnownSource:
    """The images of a record as hashes of 16 bytes each, so that a hundred million fit in memory.

    Raises UsageError when the record is damaged.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        hashes = np.fromiter(
            (pair for split, name, stamp in read_record(record) for pair in _hashed(
                split, name, stamp
            )),
            np.uint64,
        ).reshape(-1, 2)  # fmt: skip
        order = np.argsort(hashes[:, 0], kind="stable")
        self._names: NDArray[np.uint64] = hashes[order, 0]
        self._stamps: NDArray[np.uint64] = hashes[order, 1]
        self._seen = np.zeros(len(hashes), dtype=bool)

    def kind(self, entry: Entry) -> str | None:
        """new, changed, or None if the record has the image unchanged."""
        name, stamp = _hashed(entry.split, entry.name, entry.stamp)
        place = int(np.searchsorted(self._names, np.uint64(name)))
        if place == len(self._names) or int(self._names[place]) != name:
            return "new"
        self._seen[place] = True
        return None if int(self._stamps[place]) == stamp else "changed"

    def add_missing(self, changes: SourceChanges) -> None:
        """Add the images of the record that were never passed to `kind`."""
        gone = set(self._names[~self._seen].tolist())
        if gone:
            for split, name, stamp in read_record(self._record):
                if _hashed(split, name, stamp)[0] in gone:
                    changes.add("missing", name)


def _hashed(split: str, name: str, stamp: str) -> tuple[int, int]:
    return (
        _short(_name(split, public_address(name))),
        _short(stamp.encode()),
    )


def _name(split: str, name: str) -> bytes:
    return name_bytes(f"{split}\0{name}")


def _short(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
