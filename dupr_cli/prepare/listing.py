"""Lists the images of a source in a file, cut into blocks, for workers, tasks and later calls.

    OUT/.prepare/listing/<split>.jsonl    one entry per line, in the order of the shards
    OUT/.prepare/listing/<split>.starts   where each block begins: uint64
    OUT/.prepare/listing.json             number of entries, and the digest of the source
    OUT/.prepare/source.jsonl.gz          the record that is kept with the set (`source_record`)

A listing holds whole addresses, because workers, tasks and later calls fetch from them. Only its
owner can read one that holds secrets, or that is not finished and may come to hold some. It is
removed with the rest when the set is finished.

A block has `shard.max_samples` entries. Writing a listing takes as much memory as the names in one
folder, or, if shuffled, as a 64th of the entries.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from dupr_cli.addresses import public_address, without_secrets
from dupr_cli.artifacts.files import write_json
from dupr_cli.parsing import parse_json, read_json
from dupr_cli.prepare.source_record import (
    SOURCE,
    KnownSource,
    SourceDigest,
    SourceRecordWriter,
    stamp_of_content,
)
from dupr_cli.prepare.sources import Entry, ImageSource
from dupr_cli.prepare.sources.base import name_bytes
from dupr_cli.prepare.unfinished import clear
from dupr_cli.recipe import PrepareRecipe

_BUCKETS = 64
_FILE = "listing.json"
_FOLDER = "listing"


@dataclass(frozen=True)
class Listing:
    """A finished listing. entries: number of images by split. digest: of the whole source."""

    folder: Path
    entries: dict[str, int]
    digest: str
    block_size: int

    @property
    def total(self) -> int:
        return sum(self.entries.values())

    def blocks(self) -> list[tuple[str, int]]:
        """All blocks, (split, number), in the order of their shards."""
        return [
            (split, number)
            for split, entries in self.entries.items()
            for number in range(-(-entries // self.block_size))
        ]

    def read(self, split: str, block: int) -> list[Entry]:
        """The entries of one block."""
        place = self.folder / _FOLDER / split
        with place.with_suffix(".starts").open("rb") as file:
            file.seek(8 * block)
            ends = array("Q", file.read(16))
        with place.with_suffix(".jsonl").open("rb") as file:
            file.seek(ends[0])
            data = file.read(ends[1] - ends[0])
        return [_parse(line, split) for line in data.splitlines()]


def _line(entry: Entry) -> bytes:
    """An entry as JSON, without the values at its end that are empty."""
    values = [entry.name, entry.place, entry.key]
    while values[-1] in (None, "") and len(values) > 1:
        values.pop()
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes, split: str) -> Entry:
    name, *rest = parse_json(line)
    place, key = [*rest, None, None][:2]
    return Entry(name, place, split, key or "")


def split_entries(source: ImageSource, recipe: PrepareRecipe) -> Iterator[Entry]:
    """The entries of a source with their stamps; held-out ones get a split of their own."""
    share, name = recipe.split.held_out, recipe.split.name
    for entry in source.entries():
        if share and entry.split == "train" and _fraction(entry.split_key) < share:
            entry = replace(entry, split=name)
        if recipe.source.identity == "content":
            entry = replace(entry, stamp=stamp_of_content(source, entry))
        yield entry


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def survey(source: ImageSource, recipe: PrepareRecipe) -> SourceDigest:
    """Count the images by split and compute the digest, without writing anything."""
    digest = SourceDigest()
    for entry in split_entries(source, recipe):
        digest.add(entry)
    return digest


def write_listing(
    source: ImageSource, recipe: PrepareRecipe, folder: Path, known: KnownSource | None = None
) -> Listing:
    """List a source into `folder`. Raises whatever listing the source raises.

    known: list only images that this record lacks; the digest still covers the whole source.
    """
    place = folder / _FOLDER
    clear(folder, only=_FOLDER)
    place.mkdir(parents=True, exist_ok=True)
    digest, entries, files = SourceDigest(), dict[str, int](), dict[str, _SplitFile]()
    record = SourceRecordWriter(folder / SOURCE)
    try:
        for entry in split_entries(source, recipe):
            digest.add(entry)
            if known is not None and known.kind(entry) != "new":
                continue
            record.add(entry)
            entries[entry.split] = entries.get(entry.split, 0) + 1
            if entry.split not in files:
                files[entry.split] = _SplitFile(place / entry.split, recipe)
            files[entry.split].add(entry)
        for file in files.values():
            file.finish()
    finally:
        record.close()
        for file in files.values():
            file.close()
    listing = Listing(folder, entries, str(digest), recipe.shard.max_samples)
    values = asdict(listing)
    del values["folder"]
    write_json(listing_path(folder), values)
    return listing


def listing_path(folder: Path) -> Path:
    """The file that marks a listing as complete."""
    return folder / _FILE


def read_listing(folder: Path) -> Listing | None:
    """The listing in `folder`, or None if none is complete."""
    try:
        return Listing(folder, **read_json(listing_path(folder)))
    except (OSError, ValueError, TypeError):
        return None


def _open_private(path: Path, mode: str, buffering: int) -> BinaryIO:
    """Open a file that only its owner can read, from its first byte on."""
    path.touch(mode=0o600)
    return cast(BinaryIO, path.open(mode, buffering))


def _holds_secret(entry: Entry, line: bytes) -> bool:
    """Whether an entry, or its line in the listing, holds more of an address than its public form.

    What a source of another package keeps as the place of an entry may hold addresses too.
    """
    if b"://" not in line:
        return False
    text = line.decode()
    return public_address(entry.name) != entry.name or without_secrets(text) != text


class _SplitFile:
    """Writes the listing of one split."""

    def __init__(self, place: Path, recipe: PrepareRecipe) -> None:
        self._block, self._seed = recipe.shard.max_samples, recipe.seed
        self._file = _open_private(place.with_suffix(".jsonl"), "wb", 1 << 20)
        self._starts = place.with_suffix(".starts").open("wb", buffering=1 << 16)
        self._position, self._count, self._is_private = 0, 0, False
        self._buckets = [
            _open_private(place.with_suffix(f".bucket-{number:02d}"), "w+b", 1 << 16)
            for number in range(_BUCKETS if recipe.shard.shuffle else 0)
        ]

    def add(self, entry: Entry) -> None:
        line = _line(entry)
        self._is_private = self._is_private or _holds_secret(entry, line)
        if not self._buckets:
            self._append(line)
            return
        salt = b"%d %s %s" % (self._seed, name_bytes(entry.split), name_bytes(entry.name))
        order = hashlib.blake2b(salt, digest_size=8).digest()
        self._buckets[order[0] * _BUCKETS // 256].write(order.hex().encode() + line)

    def _append(self, line: bytes) -> None:
        if self._count % self._block == 0:
            self._mark()
        self._file.write(line)
        self._position += len(line)
        self._count += 1

    def _mark(self) -> None:
        self._starts.write(self._position.to_bytes(8, "little"))

    def finish(self) -> None:
        for bucket in self._buckets:
            bucket.seek(0)
            for line in sorted(bucket.read().splitlines(keepends=True)):
                self._append(line[16:])
            bucket.close()
            Path(bucket.name).unlink()
        self._mark()
        if not self._is_private:
            os.fchmod(self._file.fileno(), os.fstat(self._starts.fileno()).st_mode)

    def close(self) -> None:
        for file in (self._file, self._starts, *self._buckets):
            file.close()
