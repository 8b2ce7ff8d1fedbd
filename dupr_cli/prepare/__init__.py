"""Stage 1, `dupr prepare`: turns images of any layout into WebDataset shards with a manifest.

A source (`sources`) is listed into a file that is cut into blocks (`listing`). Each block is read,
checked and written independently (`ingest`, `blocks`) by any process, task or machine (`engines`).
When all blocks are finished, duplicates are removed and the shards get their names (`assembly`).
The bytes of the output therefore depend on source, recipe and seed alone, and finished work is kept
when a call is interrupted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.shards import MANIFEST, NOTES, SKIPPED, UNFINISHED, Manifest
from dupr_cli.datasets.placement import summarise_notes
from dupr_cli.errors import UsageError
from dupr_cli.prepare.assembly import assemble, is_planned
from dupr_cli.prepare.blocks import Work, blocks_folder, read_report
from dupr_cli.prepare.engines import WORKER_BYTES, check_engine, write_blocks
from dupr_cli.prepare.excluded_sets import ExcludedSets
from dupr_cli.prepare.exclusion import count_excluded
from dupr_cli.prepare.listing import Listing, read_listing, survey, write_listing
from dupr_cli.prepare.source_record import SOURCE, KnownSource
from dupr_cli.prepare.sources import ImageSource, make_source, nothing_found, recognise
from dupr_cli.prepare.standing import Standing, look, require_other_folder
from dupr_cli.prepare.types import PreparePlan, PrepareResult
from dupr_cli.prepare.unfinished import State, clear
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import Overrides, PrepareRecipe, as_address, as_path, resolve_recipe
from dupr_cli.runtime.machine import require_room
from dupr_cli.runtime.output import writing
from dupr_cli.runtime.stopping import stoppable


def plan(
    recipe: PrepareRecipe | str | Path,
    source: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    overwrite: bool = False,
    append: bool = False,
) -> PreparePlan:
    """List the source and say what `run` would do. Changes nothing. Raises UsageError."""
    recipe = resolve_recipe(PrepareRecipe, recipe, overrides)
    source, out = as_address(source, "source"), as_path(out, "out")
    kind = _kind(recipe, source)
    work = Work(kind, source, str(out), _recorded(recipe), near=False)
    made = make_source(kind, source, recipe.source, out)
    excluded = ExcludedSets(recipe, 0, SilentReporter())
    standing = look(work, made, excluded, overwrite=overwrite, append=append)
    entries = standing.to_read
    if entries is None:
        entries = survey(made, recipe).entries
    if not entries and standing.action == "begin":
        raise nothing_found(source)
    size = recipe.shard.max_samples
    shards = sum(-(-count // size) for count in entries.values())
    return PreparePlan(
        work.source, kind, standing.action, entries, shards, str(out), _notes(made), excluded.counts
    )


def run(
    recipe: PrepareRecipe | str | Path,
    source: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    workers: int = 0,
    overwrite: bool = False,
    append: bool = False,
    engine: str = "processes",
    task: tuple[int, int] | None = None,
    reporter: Reporter | None = None,
) -> PrepareResult:
    """Write the shards of `source` into `out`, or finish what an interrupted call began.

    recipe, overrides: see `dupr_cli.recipe.given`. workers: processes that decode; 0 means one per
    core. append: if the source has grown, add shards of the new images to the set in `out`, whose
    existing shards do not change. engine: processes or ray. task: (i, n) writes only every n-th
    block, starting with the i-th (i counts from 1); `merge` then turns the blocks into a set.
    Raises UsageError when the source or an excluded set has no images, `out` holds something else,
    the engine is not installed or there is no memory for so many workers; RunError when no image
    could be used, OSError when the output cannot be written, StoppedRunError after a signal.
    """
    recipe = resolve_recipe(PrepareRecipe, recipe, overrides)
    source, out = as_address(source, "source"), as_path(out, "out")
    check_engine(engine)
    require_room(workers, WORKER_BYTES, "--workers")
    if append and (overwrite or task is not None):
        raise UsageError("--append works without --overwrite and without --task.")
    reporter = reporter or SilentReporter()
    kind = _kind(recipe, source)
    work = Work(kind, source, str(out), _recorded(recipe), recipe.filter.duplicates == "near")
    made = make_source(kind, source, recipe.source, out)
    require_other_folder(work)
    excluded = ExcludedSets(recipe, workers, reporter)
    examine = partial(
        look, work, made, excluded, overwrite=overwrite, append=append, is_task=task is not None
    )
    if _is_only_readable(out):
        # A finished set of another user: without a file to write, there is no use for the lock.
        standing = examine()
        if standing.action == "nothing" and not standing.clears:
            return _complete(out, standing, reporter)
    with (
        stoppable("Finished shards are kept, and the same command continues from there."),
        writing(out, "dupr prepare", shared=task is not None),
    ):
        standing = examine()
        if standing.clears:
            clear(work.folder)
        if standing.action == "nothing":
            return _complete(out, standing, reporter)
        if standing.warning:
            reporter.warning(standing.warning)
        if standing.action == "append":
            reporter.info(f"{out}: {standing.changes.describe('new')}; their shards are added")
        for address, count in excluded.counts.items():
            reporter.info(f"{address}: copies of its {count} images are left out")
        with _clear_on_early_failure(work.folder, task), _task_lock(work.folder, task):
            listing = _listing(work, made, excluded, standing.action == "append", reporter)
            for note in _notes(made):
                reporter.warning(note)
            blocks = listing.blocks()
            if task is not None:
                blocks = blocks[task[0] - 1 :: task[1]]
            if not is_planned(work.folder):
                _write(work, made, listing, blocks, engine, workers, reporter)
            if task is not None:
                return _task_result(work, blocks, f"{task[0]}/{task[1]}")
            return _assemble(work, listing, reporter)


def merge(out: Path, *, reporter: Reporter | None = None) -> PrepareResult:
    """Assemble the blocks that all tasks of a preparation have written into a set.

    Raises UsageError when `out` holds no preparation, or when blocks are missing.
    """
    state = State.read(out / UNFINISHED)
    if state is None:
        if (out / MANIFEST).is_file():
            return _result(out, Manifest.read(out))
        raise UsageError(f"{out}: no task of `dupr prepare --task I/N` has written here.")
    recipe = PrepareRecipe.model_validate(state.recipe)
    work = Work(state.kind, state.source, str(out), recipe, recipe.filter.duplicates == "near")
    with (
        stoppable("Finished shards are kept, and the same command continues from there."),
        writing(out, "dupr prepare merge"),
    ):
        listing = read_listing(work.folder)
        if listing is None:
            raise UsageError(f"{out}: the listing is damaged. Begin again with --overwrite.")
        return _assemble(work, listing, reporter or SilentReporter())


def _recorded(recipe: PrepareRecipe) -> PrepareRecipe:
    """The recipe with the public form of all addresses in it."""
    public = {public_address(address): splits for address, splits in recipe.exclude.items()}
    return recipe.model_copy(update={"exclude": public})


def _is_only_readable(out: Path) -> bool:
    """Whether `out` holds a set that this process may not change."""
    return (out / MANIFEST).is_file() and not os.access(out, os.W_OK)


def _complete(out: Path, standing: Standing, reporter: Reporter) -> PrepareResult:
    """The result of a call for which there is nothing to do."""
    if standing.warning:
        reporter.warning(standing.warning)
    reporter.info(f"{out} is already complete; nothing to do")
    return _result(out, Manifest.read(out))


def _kind(recipe: PrepareRecipe, source: str) -> str:
    return recognise(source) if recipe.source.kind == "auto" else recipe.source.kind


@contextmanager
def _clear_on_early_failure(folder: Path, task: tuple[int, int] | None) -> Iterator[None]:
    """Clear the working folder if the preparation fails before its state has been written."""
    try:
        yield
    except BaseException:
        if task is None and State.read(folder) is None:  # another task may be working in the folder
            clear(folder)
        raise


@contextmanager
def _task_lock(folder: Path, task: tuple[int, int] | None) -> Iterator[None]:
    """Keep a second process from doing the same task; without tasks, `writing` locks the output."""
    folder.mkdir(parents=True, exist_ok=True)
    if task is None:
        yield
        return
    try:
        with FileLock(folder / f"task-{task[0]}-of-{task[1]}.lock", timeout=0):
            yield
    except Timeout:
        raise UsageError(
            f"{folder.parent}: another process is working on task {task[0]}/{task[1]}. Wait until "
            f"it ends, or stop it."
        ) from None


def _listing(
    work: Work, source: ImageSource, excluded: ExcludedSets, appends: bool, reporter: Reporter
) -> Listing:
    """Return the listing from an earlier call or another task, or list the source now.

    The hashes of the excluded images are written with a listing.
    """
    folder = work.folder
    with FileLock(folder / "listing.lock"):  # tasks start at the same time
        listing = read_listing(folder)
        if listing is None or State.read(folder) is None:
            reporter.detail(f"listing {work.source}")
            known = KnownSource(Path(work.out) / SOURCE) if appends else None
            listing = write_listing(source, work.recipe, folder, known)
            if not listing.total:
                raise nothing_found(work.address)
            blocks_folder(folder).mkdir(exist_ok=True)
            if excluded.sets:
                excluded.images.write(folder)
            State(
                work.recipe.model_dump(mode="json"), work.kind, work.source, listing.digest,
                source.labelled, appends, excluded.digest,
            ).write(folder)  # fmt: skip
    return listing


def _write(
    work: Work,
    source: ImageSource,
    listing: Listing,
    blocks: list[tuple[str, int]],
    engine: str,
    workers: int,
    reporter: Reporter,
) -> None:
    finished = {b: report for b in blocks if (report := read_report(work.folder, *b))}
    done = sum(report.images for report in finished.values())
    total = sum(
        min(listing.block_size, listing.entries[split] - number * listing.block_size)
        for split, number in blocks
    )
    if done:
        reporter.info(f"{work.out}: continuing; {done} of {total} images are in finished shards")
    with reporter.task("prepare", total, "images", done) as progress:
        missing = [block for block in blocks if block not in finished]
        write_blocks(work, missing, engine, workers, source.remote, progress)


def _assemble(work: Work, listing: Listing, reporter: Reporter) -> PrepareResult:
    state = State.read(work.folder)
    assert state is not None, "the state is written with the listing"
    duplicates = work.recipe.filter.duplicates
    if duplicates == "auto":
        duplicates = "keep" if state.labelled else "exact"
    out = Path(work.out)
    base = Manifest.read(out) if state.appends and not is_planned(work.folder) else None
    before = base.skipped if base else 0
    manifest = assemble(work, listing, state, duplicates, base, reporter)
    if manifest.skipped > before:
        with (out / SKIPPED).open(encoding="utf-8") as lines:
            first = json.loads(next(islice(lines, before, None)))
        reporter.warning(
            f"{manifest.skipped - before} of {listing.total} images were left out, for example "
            f"{first['path']}: {first['reason']}; {out / SKIPPED} lists them"
        )
    for line in _label_notes(out):
        reporter.warning(f"{line}; {out / NOTES} lists them")
    return _result(out, manifest)


def _notes(source: ImageSource) -> list[str]:
    # A source class from another package may lack `notes`.
    return list(getattr(source, "notes", ()))


def _label_notes(out: Path) -> list[str]:
    """Summarise the notes on labels: how many of each kind, and the first of them."""
    if not (out / NOTES).is_file():
        return []
    with (out / NOTES).open(encoding="utf-8") as lines:
        return summarise_notes(
            [(entry["path"], entry["reason"]) for entry in map(json.loads, lines)]
        )


def _result(out: Path, manifest: Manifest) -> PrepareResult:
    entries = [entry for listed in manifest.splits.values() for entry in listed]
    return PrepareResult(
        out=str(out),
        samples={
            split: sum(e.samples for e in listed) for split, listed in manifest.splits.items()
        },
        shards=len(entries),
        bytes=sum(entry.bytes for entry in entries),
        skipped=manifest.skipped,
        skip_reasons=manifest.skip_reasons,
        excluded=count_excluded(manifest.skip_reasons) if manifest.recipe.get("exclude") else None,
    )


def _task_result(work: Work, blocks: list[tuple[str, int]], task: str) -> PrepareResult:
    samples: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    size = 0
    for block in blocks:
        report = read_report(work.folder, *block)
        assert report is not None, block
        samples[block[0]] += sum(part.samples for part in report.parts)
        size += sum(part.bytes for part in report.parts)
        reasons.update(entry.reason.partition(":")[0] for entry in report.skipped)
    excluded = count_excluded(reasons) if work.recipe.exclude else None
    return PrepareResult(
        work.out, dict(samples), len(blocks), size, reasons.total(), dict(reasons), task, excluded
    )
