"""Checks that a set of shards is whole: compares every byte, decodes every image."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.shard_files import Sample, ShardIndex, index_path, scan_tar
from dupr_cli.artifacts.shards import (
    MANIFEST,
    SKIPPED,
    Manifest,
    ShardEntry,
    ShardSet,
    open_shards,
)
from dupr_cli.datasets.channels import decode_as
from dupr_cli.errors import DuprError
from dupr_cli.parsing import parse_json
from dupr_cli.prepare.engines import WORKER_BYTES
from dupr_cli.progress import Reporter
from dupr_cli.runtime.machine import require_room


@dataclass(frozen=True)
class Verified:
    """problems: one line each, with shard and key; empty if the set is whole."""

    shards: int
    samples: int
    problems: list[str]

    @property
    def whole(self) -> bool:
        return not self.problems


def verify_shards(address: str, reporter: Reporter, workers: int = 0) -> Verified:
    """Read and check a whole set. workers: processes, 0 for one per core.

    Raises UsageError when `address` holds no shards, or there is no memory for so many workers.
    """
    require_room(workers, WORKER_BYTES, "--workers")
    folder = Path(address)
    entries: list[ShardEntry | None]
    if (folder / MANIFEST).is_file():
        manifest = Manifest.read(folder)
        listed = [entry for entries in manifest.splits.values() for entry in entries]
        problems = _problems_of_folder(folder, manifest)
        tars, counts = [folder / e.file for e in listed], [e.samples for e in listed]
        shards, entries = ShardSet(tars, counts, address), [*listed]
    else:
        shards, problems = open_shards(address), []
        entries = [None] * len(shards.shards)
    good, keys = 0, set[str]()
    with (
        _mapper(workers or os.cpu_count() or 1) as mapped,
        reporter.task("verify", len(shards), "images") as progress,
    ):
        found = mapped(partial(_check, shards), enumerate(entries))
        for number, checked in enumerate(found):
            good += checked.good
            problems += checked.problems
            for key in checked.keys:
                if key in keys:
                    tar = shards.shards[number]
                    problems.append(f"{tar}: sample {key}: another sample has the same key")
                keys.add(key)
            progress.advance(shards.counts[number])
    return Verified(len(entries), good, problems)


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """A `map` that keeps the order, over worker processes if `workers` is above 1."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    # Not SIGTERM: it is how the pool ends its workers.
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield pool.imap


@dataclass(frozen=True)
class _Checked:
    """One shard: number of good samples, problems, and all keys."""

    good: int
    problems: list[str]
    keys: list[str]


def _check(shards: ShardSet, job: tuple[int, ShardEntry | None]) -> _Checked:
    number, entry = job
    tar, problems = shards.shards[number], list[str]()
    if entry is not None and (wrong := _problem_of_file(tar, entry)):
        problems.append(f"{tar}: {wrong}")
        if not tar.is_file():
            return _Checked(0, problems, [])
    try:
        index = shards.index(number)
    except DuprError as error:
        return _Checked(0, [*problems, str(error)], [])
    # If the index contradicts the manifest, positions of samples in the whole set are wrong.
    alone = ShardSet([tar], [len(index)], shards.name, shards.remote_of(number))
    good = 0
    for position, key in enumerate(index.keys):
        if wrong := _problem_of_sample(alone, position):
            problems.append(f"{tar}: sample {key}: {wrong}")
        good += not wrong
    return _Checked(good, problems, index.keys)


def _problems_of_folder(folder: Path, manifest: Manifest) -> list[str]:
    """Shards that the manifest does not list, and a number of skipped images that is wrong."""
    listed = {entry.file for entries in manifest.splits.values() for entry in entries}
    problems = [
        f"{tar}: the manifest does not list it"
        for tar in sorted(folder.glob("*.tar"))
        if tar.name not in listed
    ]
    try:
        lines = (folder / SKIPPED).read_text(encoding="utf-8").splitlines()
        for line in lines:
            parse_json(line)
    except (OSError, ValueError) as error:
        return [*problems, f"{folder / SKIPPED} cannot be read: {error}"]
    if len(lines) != manifest.skipped:
        problems.append(
            f"{folder / SKIPPED}: {len(lines)} lines, {manifest.skipped} by the manifest"
        )
    return problems


def _problem_of_file(tar: Path, entry: ShardEntry) -> str:
    """What is wrong with a shard as a file; empty if it agrees with the manifest."""
    if not tar.is_file():
        return "it is missing"
    if tar.stat().st_size != entry.bytes:
        return f"it has {tar.stat().st_size} bytes, {entry.bytes} by the manifest"
    if sha256_file(tar) != entry.sha256:
        return "its sha256 is not that of the manifest: bytes in it have changed"
    beside = index_path(tar)
    if not beside.is_file():
        return "its index is missing"
    try:
        index, scanned = ShardIndex.read(beside), scan_tar(tar)
    except DuprError as error:
        return str(error)
    places = [tuple(place) for place in index.images]
    if (index.keys, places, index.sha256) != (scanned.keys, scanned.images, entry.sha256):
        return "its index belongs to another shard"
    if len(index) != entry.samples:
        return f"it has {len(index)} samples, {entry.samples} by the manifest"
    return ""


def _problem_of_sample(shards: ShardSet, number: int) -> str:
    try:
        sample = shards[number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = _decoded_size(sample)
    except DuprError as error:
        return str(error)
    except MemoryError:
        raise
    # On damaged files, decoders raise exceptions of any kind.
    except Exception as error:
        return f"does not decode: {error}"
    if sample.width and size != (sample.width, sample.height):
        return f"it has {size[0]} x {size[1]} pixels, {sample.width} x {sample.height} by its JSON"
    return ""


def _decoded_size(sample: Sample) -> tuple[int, int]:
    """Width and height of an image, decoded as it is stored."""
    file = io.BytesIO(sample.image)
    if sample.pixels is not None:
        return decode_as(file, sample.pixels).size
    image = Image.open(file)
    size = image.size
    image.load()
    return size
