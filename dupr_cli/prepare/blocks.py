"""Writes one block of a listing as shards: the unit of work for processes, tasks and machines.

    OUT/.prepare/blocks/train-000007.000.tar          the first part of block 7, and its index
    OUT/.prepare/blocks/train-000007.000.index.json
    OUT/.prepare/blocks/train-000007.records          a `duplicates.RECORD` for each sample
    OUT/.prepare/blocks/train-000007.json             written last: the block is finished

Blocks are independent, so any number of processes, tasks and machines writes the same bytes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import numpy as np
from PIL import Image

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.files import write_bytes, write_json
from dupr_cli.artifacts.shard_files import ShardWriter
from dupr_cli.artifacts.shards import UNFINISHED, ShardEntry, Skipped
from dupr_cli.parsing import read_json, validated
from dupr_cli.prepare.duplicates import RECORD, Array
from dupr_cli.prepare.exclusion import ExcludedImages
from dupr_cli.prepare.ingest import ingest
from dupr_cli.prepare.listing import Listing, listing_path, read_listing
from dupr_cli.prepare.sources import Entry, ImageSource, make_source
from dupr_cli.recipe import PrepareRecipe

_FOLDER = "blocks"

_POLL_SECONDS = 0.2

T = TypeVar("T")


def _nothing(_count: int) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """What all blocks have in common; it is sent to the workers.

    kind, address: of the source. recipe: as it is recorded, so addresses of excluded sets are in
    their public form. near: whether to compute perceptual hashes.
    """

    kind: str
    address: str
    out: str
    recipe: PrepareRecipe
    near: bool

    @property
    def source(self) -> str:
        """The address as it may be recorded and shown."""
        return public_address(self.address)

    @property
    def folder(self) -> Path:
        return Path(self.out) / UNFINISHED

    def __hash__(self) -> int:
        return hash((self.kind, self.address, self.out))


@dataclass(frozen=True)
class BlockReport:
    """A finished block. parts: its tars, usually one; empty if no image could be used.

    notes: remarks on the labels of its images, one per label.
    """

    images: int
    parts: list[ShardEntry]
    skipped: list[Skipped]
    classes: list[str]
    notes: list[Skipped] = field(default_factory=list)


def block_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


def blocks_folder(folder: Path) -> Path:
    return folder / _FOLDER


def read_report(folder: Path, split: str, number: int) -> BlockReport | None:
    """The report of a block, or None if the block is not complete."""
    blocks = blocks_folder(folder)
    name = block_name(split, number)
    try:
        values = read_json(blocks / f"{name}.json")
        parts = validated(list[ShardEntry], values["parts"])
        if any((blocks / part.file).stat().st_size != part.bytes for part in parts):
            return None
        samples = sum(part.samples for part in parts)
        if samples and (blocks / f"{name}.records").stat().st_size != samples * RECORD.itemsize:
            return None
        skipped = [Skipped(*pair) for pair in values["skipped"]]
        notes = [Skipped(*pair) for pair in values.get("notes", [])]
        return BlockReport(values["images"], parts, skipped, values["classes"], notes)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_records(folder: Path, split: str, number: int) -> Array:
    """(samples,) `RECORD`s of a finished block."""
    path = blocks_folder(folder) / f"{block_name(split, number)}.records"
    return np.fromfile(path, RECORD) if path.exists() else np.empty(0, RECORD)


@lru_cache(maxsize=2)
def _opened(work: Work, _listed: int) -> tuple[ImageSource, Listing, ExcludedImages | None]:
    """What all blocks need, cached between them. _listed: when the listing was written."""
    listing = read_listing(work.folder)
    assert listing is not None, "the listing is written before any block"
    source = make_source(work.kind, work.address, work.recipe.source, Path(work.out))
    excluded = ExcludedImages.read(work.folder) if work.recipe.exclude else None
    return source, listing, excluded


def write_block(
    work: Work,
    block: tuple[str, int],
    threads: int = 1,
    advance: Callable[[int], None] = _nothing,
) -> BlockReport:
    """Ingest the entries of one block into one or several tars.

    threads: number of threads that read and decode. advance: called with 1 after each image, and
    with 0 while threads are waited for; it may raise. Raises OSError when the output cannot be
    written; the tar being written is then removed.
    """
    Image.preinit()
    with warnings.catch_warnings(action="ignore"):  # Pillow warns about odd metadata
        return _write_block(work, block, threads, advance)


def _write_block(
    work: Work, block: tuple[str, int], threads: int, advance: Callable[[int], None]
) -> BlockReport:
    split, number = block
    source, listing, excluded = _opened(work, listing_path(work.folder).stat().st_mtime_ns)
    entries = listing.read(split, number)
    name, blocks = block_name(split, number), blocks_folder(work.folder)
    parts, limit = list[ShardEntry](), work.recipe.shard.max_bytes
    skipped, classes, keys = list[Skipped](), set[str](), dict[str, bytes]()
    notes = list[Skipped]()
    records = np.zeros(len(entries), RECORD)
    writer = _writer(blocks, name, 0)

    def close_part() -> None:
        index = writer.finish()
        parts.append(ShardEntry(writer.path.name, len(index), index.bytes, index.sha256))

    try:
        read = partial(
            ingest, read=source.read, recipe=work.recipe, look=work.near, excluded=excluded
        )
        for found in in_order(read, entries, threads, advance):
            advance(1)
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            sample = found.sample
            key = sample.key
            if keys.get(key, found.sha256) != found.sha256:
                key = another_key(key, found.sha256.hex())
            if key in keys:
                skipped.append(Skipped(sample.source, f"listed twice: key {key}"))
                continue
            keys[key] = found.sha256
            if key != sample.key:
                sample = replace(sample, key=key)
            if limit and len(writer) and writer.bytes + writer.size_of(sample) > limit:
                close_part()
                writer = _writer(blocks, name, len(parts))
            writer.add(sample)
            notes += [Skipped(sample.source, note) for note in found.notes]
            classes |= {box.name for box in sample.boxes or ()}
            row = records[sum(part.samples for part in parts) + len(writer) - 1]
            row["key"] = _short(hashlib.sha256(sample.key.encode()).digest())
            row["low"], row["high"] = _short(found.sha256), _short(found.sha256[8:])
            row["look"] = found.look
        if len(writer):
            close_part()
    except BaseException:
        writer.abandon()
        raise
    report = BlockReport(len(entries), parts, skipped, sorted(classes), notes)
    write_bytes(blocks / f"{name}.records", records[: sum(p.samples for p in parts)].tobytes())
    write_json(
        blocks / f"{name}.json",
        {
            **asdict(report),
            "skipped": [[entry.path, entry.reason] for entry in skipped],
            "notes": [[entry.path, entry.reason] for entry in notes],
        },
    )
    return report


def another_key(key: str, sha256: str) -> str:
    """A key for an image whose own key already belongs to another image."""
    return f"{key}-{sha256[:8]}"


def _writer(blocks: Path, name: str, part: int) -> ShardWriter:
    return ShardWriter(blocks / f"{name}.{part:03d}.tar")


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def in_order(
    read: Callable[[Entry], T],
    entries: Sequence[Entry],
    threads: int,
    advance: Callable[[int], None] = _nothing,
) -> Iterator[T]:
    """Yield results in the order of the entries; several threads read a few entries ahead.

    advance: called with 0 while no result is ready; it may raise. The threads are then left behind,
    since one of them may be waiting for a server.
    """
    if threads == 1:
        yield from map(read, entries)
        return
    jobs: SimpleQueue[tuple[Entry, Future[T]] | None] = SimpleQueue()
    for _ in range(threads):
        # Python waits at its exit for the threads of its own pools, but not for daemons.
        Thread(target=_read_jobs, args=(read, jobs), daemon=True).start()
    waiting: deque[Future[T]] = deque()
    try:
        for entry in entries:
            waiting.append(Future())
            jobs.put((entry, waiting[-1]))
            if len(waiting) > 2 * threads:
                yield _result(waiting.popleft(), advance)
        while waiting:
            yield _result(waiting.popleft(), advance)
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(threads):
            jobs.put(None)


def _read_jobs(
    read: Callable[[Entry], T], jobs: SimpleQueue[tuple[Entry, Future[T]] | None]
) -> None:
    while (job := jobs.get()) is not None:
        entry, future = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(entry))
            except BaseException as error:
                future.set_exception(error)


def _result(future: Future[T], advance: Callable[[int], None]) -> T:
    while not wait([future], _POLL_SECONDS).done:
        advance(0)
    return future.result()
