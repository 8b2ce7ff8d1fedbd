"""From finished blocks to a finished set: duplicates out, final names, manifest.

What is to be done is decided first and written down (`plan.json`); then every step can be repeated,
so that an interruption anywhere in between is made good by the next call.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_json, write_text
from dupr_cli.artifacts.shard_files import ShardIndex, ShardWriter, index_path, shard_name
from dupr_cli.artifacts.shards import (
    MANIFEST,
    NOTES,
    SKIPPED,
    Manifest,
    ShardEntry,
    ShardSet,
    Skipped,
)
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.blocks import (
    BlockReport,
    Work,
    another_key,
    blocks_folder,
    read_records,
    read_report,
)
from dupr_cli.prepare.duplicates import Array, equal_rows, similar_rows
from dupr_cli.prepare.listing import Listing
from dupr_cli.progress import Reporter
from dupr_cli.recipe.prepare import FilterSection

_PLAN = "plan.json"


@dataclass(frozen=True)
class _Part:
    """A tar of a block. start: position of its first sample among all samples."""

    split: str
    entry: ShardEntry
    start: int


def is_planned(folder: Path) -> bool:
    """Whether assembly has begun: all blocks were done, some may have their final names."""
    return (folder / _PLAN).exists()


def assemble(
    work: Work, listing: Listing, fingerprint: str, duplicates: str, reporter: Reporter
) -> Manifest:
    """Make a set of all blocks of `listing` and write its manifest.

    duplicates: keep, exact or near. Raises UsageError when blocks are missing, RunError when not a
    single image could be used.
    """
    out, folder = Path(work.out), work.folder
    if not is_planned(folder):
        _plan(work, listing, fingerprint, duplicates, reporter)
    plan = json.loads((folder / _PLAN).read_bytes())
    if not plan["cleared"]:
        for name in plan["remove"]:
            (out / name).unlink(missing_ok=True)
        write_json(folder / _PLAN, {**plan, "cleared": True})
    splits: dict[str, list[ShardEntry]] = {split: [] for split in plan["shards"]}
    total = sum(len(shards) for shards in plan["shards"].values())
    with reporter.task("name shards", total, "shards") as progress:
        for split, shards in plan["shards"].items():
            for number, shard in enumerate(shards):
                splits[split].append(_place(out, folder, shard, shard_name(split, number)))
                progress.advance(1)
    manifest = Manifest(splits=splits, **plan["manifest"])
    for name in (SKIPPED, NOTES):
        if (folder / name).exists():
            (folder / name).replace(out / name)
    manifest.write(out)
    shutil.rmtree(folder)
    return manifest


def _place(out: Path, folder: Path, shard: dict[str, Any], name: str) -> ShardEntry:
    """Give a part its final name, or write it anew where samples leave it or change their key."""
    part, final = blocks_folder(folder) / shard["part"], out / name
    if shard["drop"] or shard["rename"]:
        if part.exists():
            _rewrite(part, final, set(shard["drop"]), shard["rename"])
            index_path(part).unlink(missing_ok=True)
            part.unlink()
        index = ShardIndex.read(index_path(final))
        return ShardEntry(name, len(index), index.bytes, index.sha256)
    for before, after in ((part, final), (index_path(part), index_path(final))):
        if before.exists():
            before.replace(after)
    return ShardEntry(name, shard["samples"], shard["bytes"], shard["sha256"])


def _rewrite(part: Path, final: Path, drop: set[int], rename: dict[str, str]) -> None:
    index = ShardIndex.read(index_path(part))
    samples = ShardSet([part], [len(index)], str(part))
    writer = ShardWriter(final)
    try:
        for number in range(len(index)):
            if number not in drop:
                sample = samples.whole(number)
                writer.add(replace(sample, key=rename.get(str(number), sample.key)))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _plan(
    work: Work, listing: Listing, fingerprint: str, duplicates: str, reporter: Reporter
) -> None:
    """Decide what the set will be, and write it down. Nothing else is changed."""
    out, folder = Path(work.out), work.folder
    reports = _reports(folder, listing, out)
    parts = _parts(reports)
    total = sum(part.entry.samples for part in parts)
    skipped = [entry for report in reports.values() for entry in report.skipped]
    if not total:
        first = skipped[0]
        shutil.rmtree(folder)
        raise RunError(
            f"{work.address}: none of {listing.total} images could be used; the first, "
            f"{first.path}: {first.reason}."
        )
    changes = _changes(folder, reports, total, duplicates, work.recipe.filter, reporter)
    names = _Names(blocks_folder(folder), parts)
    for position, (first_one, reason) in changes.drop.items():
        skipped.append(Skipped(names.source(position), f"{reason}: {names.key(first_one)}"))
    shards: dict[str, list[dict[str, object]]] = {split: [] for split in listing.entries}
    dropped = list(changes.drop)
    for part in parts:
        drop = [p - part.start for p in _inside(part, dropped)]
        if len(drop) == part.entry.samples:
            continue
        rename = {
            str(p - part.start): another_key(names.key(p), names.sha256(p))
            for p in _inside(part, changes.rename)
        }
        entry = part.entry
        shards[part.split].append(
            {
                "part": entry.file, "samples": entry.samples, "bytes": entry.bytes,
                "sha256": entry.sha256, "drop": drop, "rename": rename,
            }
        )  # fmt: skip
    reasons = Counter(entry.reason.partition(":")[0] for entry in skipped)
    _write_lines(folder / SKIPPED, skipped)
    notes = [entry for report in reports.values() for entry in report.notes]
    if notes:
        _write_lines(folder / NOTES, notes)
    manifest = {
        "classes": sorted({name for report in reports.values() for name in report.classes}),
        "skipped": len(skipped),
        "skip_reasons": dict(reasons.most_common()),
        "source": work.address,
        "recipe": work.recipe.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "dupr_version": __version__,
    }
    write_json(
        folder / _PLAN,
        {"remove": _files_of(out), "cleared": False, "shards": shards, "manifest": manifest},
    )


def _write_lines(path: Path, entries: list[Skipped]) -> None:
    lines = (json.dumps({"path": e.path, "reason": e.reason}, ensure_ascii=False) for e in entries)
    write_text(path, "".join(line + "\n" for line in lines))


def _reports(folder: Path, listing: Listing, out: Path) -> dict[tuple[str, int], BlockReport]:
    reports, missing = {}, 0
    for split, number in listing.blocks():
        report = read_report(folder, split, number)
        if report is None:
            missing += 1
        else:
            reports[split, number] = report
    if missing:
        raise UsageError(
            f"{out}: {missing} of {len(listing.blocks())} blocks are not finished. Give the "
            f"commands of the tasks again that have not ended, then merge."
        )
    return reports


def _parts(reports: dict[tuple[str, int], BlockReport]) -> list[_Part]:
    parts, start = [], 0
    for (split, _), report in reports.items():
        for entry in report.parts:
            parts.append(_Part(split, entry, start))
            start += entry.samples
    return parts


def _inside(part: _Part, positions: list[int]) -> list[int]:
    """Those of sorted positions that lie in a part."""
    end = part.start + part.entry.samples
    return positions[bisect_left(positions, part.start) : bisect_left(positions, end)]


def _files_of(out: Path) -> list[str]:
    """Names of the files of the set that is there already, its manifest first."""
    if not (out / MANIFEST).exists():
        return []
    try:
        splits = Manifest.read(out).splits
        # By its last part: a manifest that leads elsewhere must not cost files there.
        tars = [out / Path(entry.file).name for listed in splits.values() for entry in listed]
        shards = [path for tar in tars for path in (tar, index_path(tar))]
    except UsageError:  # damaged: by the names that shards have
        numbered = "*-[0-9][0-9][0-9][0-9][0-9][0-9]"
        shards = [*out.glob(f"{numbered}.tar"), *out.glob(f"{numbered}.index.json")]
    return [
        path.relative_to(out).as_posix()
        for path in (out / MANIFEST, out / SKIPPED, out / NOTES, *shards)
    ]


@dataclass(frozen=True)
class _Changes:
    """By position: what is left out, with the one it equals and how; what gets another key."""

    drop: dict[int, tuple[int, str]]
    rename: list[int]


def _changes(
    folder: Path,
    reports: dict[tuple[str, int], BlockReport],
    total: int,
    duplicates: str,
    recipe: FilterSection,
    reporter: Reporter,
) -> _Changes:
    def records() -> Iterator[tuple[int, Array]]:
        start = 0
        for block in reports:
            found = read_records(folder, *block)
            yield start, found
            start += len(found)

    twice = equal_rows(records, total, ("key", "low", "high"))
    drop = {int(p): (int(first), "listed twice") for p, first in twice}
    if duplicates in ("exact", "near"):
        for p, first in equal_rows(records, total, ("low", "high")):
            drop.setdefault(int(p), (int(first), "duplicate of"))
    if duplicates == "near":
        reporter.info("comparing perceptual hashes")
        out = np.array(sorted(drop), np.int64)
        for p, first in similar_rows(records, out, recipe.near_distance):
            drop.setdefault(int(p), (int(first), "looks like"))
    same_key = {int(p) for p, _ in equal_rows(records, total, ("key",))}
    return _Changes(dict(sorted(drop.items())), sorted(same_key - drop.keys()))


class _Names:
    """What samples are called, read as it is asked for."""

    def __init__(self, blocks: Path, parts: list[_Part]) -> None:
        self._samples = ShardSet(
            [blocks / part.entry.file for part in parts],
            [part.entry.samples for part in parts],
            str(blocks),
        )
        self._samples.cached_indexes = 64

    def key(self, position: int) -> str:
        shard, place = self._samples.place(position)
        return self._samples.index(shard).keys[place]

    def source(self, position: int) -> str:
        return self._samples[position].source

    def sha256(self, position: int) -> str:
        return hashlib.sha256(self._samples[position].image).hexdigest()
