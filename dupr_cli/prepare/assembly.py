"""Turns finished blocks into a finished set: removes duplicates, names shards, writes the manifest.

All decisions are made first and written to `plan.json`. Every later step can be repeated, so the
next call completes an assembly that was interrupted at any point.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dupr_cli import __version__
from dupr_cli.addresses import public_address
from dupr_cli.artifacts.files import atomic_file, write_json, write_text
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
from dupr_cli.errors import DuprError, RunError, UsageError
from dupr_cli.outside_text import json_text
from dupr_cli.parsing import read_json
from dupr_cli.prepare.blocks import (
    BlockReport,
    Work,
    another_key,
    blocks_folder,
    read_records,
    read_report,
)
from dupr_cli.prepare.duplicates import RECORD, Array, equal_rows, similar_rows
from dupr_cli.prepare.ingest import pixel_format
from dupr_cli.prepare.listing import Listing
from dupr_cli.prepare.source_record import SOURCE
from dupr_cli.prepare.unfinished import State, clear
from dupr_cli.progress import Reporter
from dupr_cli.recipe import recipe_digest
from dupr_cli.recipe.prepare import FilterSection
from dupr_cli.runtime.output import remove

_PLAN = "plan.json"
# Records of all samples, kept to find duplicates among images that are added later.
RECORDS = "records.bin"
_BESIDE = (SKIPPED, NOTES, SOURCE, RECORDS)  # the other files of a set


@dataclass(frozen=True)
class _Part:
    """One tar of a block. start: position of its first sample among all samples."""

    split: str
    entry: ShardEntry
    start: int


def is_planned(folder: Path) -> bool:
    """Whether assembly has begun: all blocks are finished and some may have their final names."""
    return (folder / _PLAN).exists()


def digests_in(fingerprint: str) -> tuple[str, str]:
    """The digests of the source and of the excluded images in the fingerprint of a manifest."""
    parts = fingerprint.split("-")
    return parts[-1], parts[1] if len(parts) == 3 else ""


def _fingerprint(work: Work, listing: Listing, excluded: str) -> str:
    """What identifies a set: recipe, excluded images if there are any, and source."""
    return "-".join(filter(None, (recipe_digest(work.recipe), excluded, listing.digest)))


def assemble(
    work: Work,
    listing: Listing,
    state: State,
    duplicates: str,
    base: Manifest | None,
    reporter: Reporter,
) -> Manifest:
    """Assemble all blocks of `listing` into a set and write its manifest.

    duplicates: keep, exact or near. base: the existing set when shards are added to it; its files
    do not change. Raises UsageError when blocks are missing, RunError when no image could be used.
    """
    out, folder = Path(work.out), work.folder
    if not is_planned(folder):
        _plan(work, listing, state, duplicates, base, reporter)
    plan = read_json(folder / _PLAN)
    if not plan["cleared"]:
        remove(out, [out / name for name in plan["remove"]])
        write_json(folder / _PLAN, {**plan, "cleared": True})
    splits = {
        split: [ShardEntry(**entry) for entry in plan.get("kept", {}).get(split, [])]
        for split in [*plan.get("kept", {}), *plan["shards"]]
    }
    total = sum(len(shards) for shards in plan["shards"].values())
    with reporter.task("name shards", total, "shards") as progress:
        for split, shards in plan["shards"].items():
            for shard in shards:
                name = shard_name(split, len(splits[split]))
                splits[split].append(_place(out, folder, shard, name))
                progress.advance(1)
    manifest = Manifest(splits=splits, pixels=pixel_format(work.recipe.image), **plan["manifest"])
    for name in _BESIDE:
        if (folder / name).exists():
            (folder / name).replace(out / name)
    manifest.write(out)
    clear(folder)
    return manifest


def _place(out: Path, folder: Path, shard: dict[str, Any], name: str) -> ShardEntry:
    """Give a part its final name; rewrite it if samples are dropped or get another key."""
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
    work: Work,
    listing: Listing,
    state: State,
    duplicates: str,
    base: Manifest | None,
    reporter: Reporter,
) -> None:
    """Decide what the set will contain and write the plan. Changes nothing else."""
    out, folder = Path(work.out), work.folder
    reports = _reports(folder, listing, out)
    existing = _existing_parts(base) if base else []
    parts = _parts(reports, sum(part.entry.samples for part in existing))
    total = sum(part.entry.samples for part in parts)
    skipped = [entry for report in reports.values() for entry in report.skipped]
    if not total and base is None:
        first = skipped[0]
        clear(folder)
        raise RunError(
            f"{work.source}: none of {listing.total} images could be used. The first is "
            f"{first.path}: {first.reason}."
        )
    records = _Records(folder, out / RECORDS, existing, list(reports))
    changes = _changes(records, records.before + total, duplicates, work.recipe.filter, reporter)
    names = _Names(out, existing, blocks_folder(folder), parts)
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
    classes = {name for report in reports.values() for name in report.classes}
    notes = [entry for report in reports.values() for entry in report.notes]
    if base is not None:
        reasons.update(base.skip_reasons)
        classes |= set(base.classes)
        _join_records(folder, out)
    _write_lines(folder / SKIPPED, skipped, out if base else None)
    if notes:
        _write_lines(folder / NOTES, notes, out if base else None)
    records.write(folder / RECORDS, np.array(dropped, np.int64))
    manifest = {
        "classes": sorted(classes),
        "skipped": len(skipped) + (base.skipped if base else 0),
        "skip_reasons": dict(reasons.most_common()),
        "source": work.source,
        "recipe": work.recipe.model_dump(mode="json"),
        "fingerprint": _fingerprint(work, listing, state.excluded),
        "dupr_version": __version__,
    }
    write_json(
        folder / _PLAN,
        {
            "remove": []
            if base
            else [path.relative_to(out).as_posix() for path in output_files(out)],
            "cleared": False,
            "kept": asdict(base)["splits"] if base else {},
            "shards": shards,
            "manifest": manifest,
        },
    )


def _join_records(folder: Path, out: Path) -> None:
    """Append the new record to that of the set: concatenated gzip files form a valid gzip file."""
    joined, new = folder / f".{SOURCE}.joined.tmp", folder / SOURCE
    with joined.open("wb") as file:
        for path in (out / SOURCE, new):
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
        file.flush()
        os.fsync(file.fileno())
    joined.replace(new)


def _write_lines(path: Path, entries: list[Skipped], base: Path | None) -> None:
    """Write one line of JSON per entry, after the lines of the set in `base`."""
    earlier = base / path.name if base else None
    lines = [earlier.read_text(encoding="utf-8")] if earlier and earlier.exists() else []
    for entry in entries:
        values = {"path": entry.path, "reason": entry.reason}
        lines.append(json_text(values) + "\n")
    write_text(path, "".join(lines))


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
            f"{out}: {missing} of {len(listing.blocks())} blocks are not finished. Run the "
            f"unfinished tasks again, then merge."
        )
    return reports


def _existing_parts(base: Manifest) -> list[_Part]:
    """The shards of the existing set."""
    parts, start = [], 0
    for split, entries in base.splits.items():
        for entry in entries:
            parts.append(_Part(split, entry, start))
            start += entry.samples
    return parts


def _parts(reports: dict[tuple[str, int], BlockReport], start: int) -> list[_Part]:
    """The tars of the blocks. start: number of samples before them."""
    parts = []
    for (split, _), report in reports.items():
        for entry in report.parts:
            parts.append(_Part(split, entry, start))
            start += entry.samples
    return parts


def _inside(part: _Part, positions: list[int]) -> list[int]:
    """Those of the sorted `positions` that lie in a part."""
    end = part.start + part.entry.samples
    return positions[bisect_left(positions, part.start) : bisect_left(positions, end)]


def output_files(out: Path) -> list[Path]:
    """The files of the set in `out` according to its manifest, which comes first.

    If the manifest is damaged, a tar counts if dupr's index beside it gives the tar's exact size.
    """
    if not (out / MANIFEST).exists():
        return []
    try:
        splits = Manifest.read(out).splits
        # Only the last part of the path: a manifest that points elsewhere must not delete files.
        tars = [out / Path(entry.file).name for listed in splits.values() for entry in listed]
    except UsageError:
        tars = [tar for tar in out.glob("*.tar") if _is_indexed(tar)]
    shards = [path for tar in tars for path in (tar, index_path(tar))]
    return [out / MANIFEST, *(out / name for name in _BESIDE), *shards]


def _is_indexed(tar: Path) -> bool:
    try:
        return ShardIndex.read(index_path(tar)).bytes == tar.stat().st_size
    except (OSError, DuprError):
        return False


@dataclass(frozen=True)
class _Changes:
    """Changes by position.

    drop: for each sample left out, the earlier sample it repeats and the reason. rename: samples
    that get another key.
    """

    drop: dict[int, tuple[int, str]]
    rename: list[int]


class _Records:
    """`RECORD`s of all samples in order: those of the existing set, then those of each block."""

    def __init__(
        self, folder: Path, file: Path, existing: list[_Part], blocks: list[tuple[str, int]]
    ) -> None:
        """file: records of the samples in `existing`, in the same order.

        Raises UsageError when the file does not hold them.
        """
        self._folder, self._file, self._existing, self._blocks = folder, file, existing, blocks
        self.before = before = sum(part.entry.samples for part in existing)
        if before and (not file.is_file() or file.stat().st_size != before * RECORD.itemsize):
            raise UsageError(
                f"{file}: the records of the {before} existing samples are missing or belong to "
                f"another set, so duplicates of them cannot be found. Restore the file, or make "
                f"the set again with --overwrite."
            )

    def __call__(self) -> Iterator[tuple[int, Array]]:
        for _, start, found in self._by_split():
            yield start, found

    def _by_split(self) -> Iterator[tuple[str, int, Array]]:
        if self._existing:
            found = np.fromfile(self._file, RECORD)
            for part in self._existing:
                yield part.split, part.start, found[part.start :][: part.entry.samples]
        start = self.before
        for block in self._blocks:
            found = read_records(self._folder, *block)
            yield block[0], start, found
            start += len(found)

    def write(self, path: Path, dropped: Array) -> None:
        """Write all records except those of dropped samples, in the order of the final set."""
        splits = dict.fromkeys(split for split, _, _ in self._by_split())
        with atomic_file(path) as file:
            for wanted in splits:
                for split, start, found in self._by_split():
                    if split == wanted:
                        positions = np.arange(start, start + len(found))
                        file.write(found[~np.isin(positions, dropped)].tobytes())


def _changes(
    records: _Records, total: int, duplicates: str, recipe: FilterSection, reporter: Reporter
) -> _Changes:
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
    """Keys, source names and hashes of samples, read on demand."""

    def __init__(self, out: Path, existing: list[_Part], blocks: Path, parts: list[_Part]) -> None:
        self._samples = ShardSet(
            [
                *(out / part.entry.file for part in existing),
                *(blocks / part.entry.file for part in parts),
            ],
            [part.entry.samples for part in [*existing, *parts]],
            str(blocks),
        )
        self._samples.cached_indexes = 64

    def key(self, position: int) -> str:
        shard, place = self._samples.place(position)
        return self._samples.index(shard).keys[place]

    def source(self, position: int) -> str:
        return public_address(self._samples[position].source)

    def sha256(self, position: int) -> str:
        return hashlib.sha256(self._samples[position].image).hexdigest()
