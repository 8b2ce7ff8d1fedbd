"""Stage 1, `dupr prepare`: images of any layout to WebDataset shards with a manifest.

A source (`sources`) is listed into a file (`listing`), cut into blocks; a block is read, checked
and written by itself (`ingest`, `blocks`), by whichever process, task or machine (`engines`); when
all are done, duplicates leave and the shards get their names (`assembly`). So the bytes of the
output depend on source, recipe and seed alone, and whatever is finished stays finished.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.artifacts.shards import MANIFEST, NOTES, SKIPPED, UNFINISHED, Manifest
from dupr_cli.datasets.placement import said
from dupr_cli.errors import UsageError
from dupr_cli.prepare.assembly import assemble, is_planned
from dupr_cli.prepare.blocks import Work, blocks_folder, read_report
from dupr_cli.prepare.engines import check_engine, write_blocks
from dupr_cli.prepare.listing import Listing, read_listing, survey, write_listing
from dupr_cli.prepare.sources import ImageSource, make_source, nothing_found, recognise
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import PrepareRecipe, recipe_digest

_STATE = "state.json"


@dataclass(frozen=True)
class PreparePlan:
    """What a preparation will do, before it does it."""

    source: str
    kind: str
    items: dict[str, int]
    shards: int
    out: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PrepareResult:
    """What a preparation left behind. samples: per split.

    task: of `--task`, which leaves blocks only; shards is then their number.
    """

    out: str
    samples: dict[str, int]
    shards: int
    bytes: int
    skipped: int
    skip_reasons: dict[str, int]
    task: str | None = None


def plan(recipe: PrepareRecipe, source: str, out: Path) -> PreparePlan:
    """List the source and say what `run` would do. Raises UsageError."""
    kind = _kind(recipe, source)
    work = Work(kind, source, str(out), recipe, near=False)
    made = make_source(kind, source, recipe.source, out)
    entries, _ = survey(made, recipe)
    if not entries:
        raise nothing_found(source)
    _is_complete(work, made, overwrite=True, is_task=False)
    size = recipe.shard.max_samples
    shards = sum(-(-count // size) for count in entries.values())
    return PreparePlan(source, kind, entries, shards, str(out), _notes(made))


def run(
    recipe: PrepareRecipe,
    source: Path | str,
    out: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    engine: str = "processes",
    task: tuple[int, int] | None = None,
    reporter: Reporter | None = None,
) -> PrepareResult:
    """Write the shards of `source` into `out`, or finish what an interrupted call began.

    workers: processes that decode; 0 means one per core. engine: processes or ray. task: (i, n),
    write only every n-th block from the i-th on, i from 1; `merge` makes a set of them.
    Raises UsageError when the source has no images, `out` holds something else or the engine is not
    installed, RunError when no image could be used, OSError when the output cannot be written.
    """
    check_engine(engine)
    source, reporter = str(source), reporter or SilentReporter()
    kind = _kind(recipe, source)
    work = Work(kind, source, str(out), recipe, recipe.filter.duplicates == "near")
    made = make_source(kind, source, recipe.source, out)
    name = "run" if task is None else f"task-{task[0]}-of-{task[1]}"
    if _is_complete(work, made, overwrite, task is not None):
        reporter.info(f"{out} is complete already; nothing to do")
        return _result(out, Manifest.read(out))
    with _begun(out, task is None), _alone(work.folder, name):
        listing = _listing(work, made, reporter)
        for note in _notes(made):
            reporter.warning(note)
        blocks = listing.blocks()
        if task is not None:
            blocks = blocks[task[0] - 1 :: task[1]]
        if not is_planned(work.folder):
            _write(work, made, listing, blocks, engine, workers, reporter)
        if task is not None:
            return _task_result(work, blocks, f"{task[0]}/{task[1]}")
        return _assemble(work, listing, made.labelled, reporter)


def merge(out: Path, *, reporter: Reporter | None = None) -> PrepareResult:
    """Make a set of what all tasks of a preparation have written.

    Raises UsageError when there is no preparation in `out`, or when blocks are missing.
    """
    state = _read_state(out / UNFINISHED)
    if state is None:
        if (out / MANIFEST).is_file():
            return _result(out, Manifest.read(out))
        raise UsageError(f"{out}: no tasks of `dupr prepare --task I/N` have written here.")
    recipe = PrepareRecipe.model_validate(state["recipe"])
    work = Work(
        state["kind"], state["source"], str(out), recipe, recipe.filter.duplicates == "near"
    )
    with _alone(work.folder, "run"):
        listing = read_listing(work.folder)
        if listing is None:
            raise UsageError(f"{out}: the listing is damaged. Begin again with --overwrite.")
        return _assemble(work, listing, state["labelled"], reporter or SilentReporter())


def _kind(recipe: PrepareRecipe, source: str) -> str:
    return recognise(source) if recipe.source.kind == "auto" else recipe.source.kind


def _is_complete(work: Work, source: ImageSource, overwrite: bool, is_task: bool) -> bool:
    """Whether the set is there already.

    Raises UsageError when something else is there, unless it may be overwritten.
    """
    out = Path(work.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; OUT is a directory.")
    if not is_remote(work.address) and out.resolve() == Path(work.address).resolve():
        raise UsageError(f"{out}: OUT is the source itself; give another directory.")
    state = _read_state(work.folder)
    finished = (out / MANIFEST).is_file()
    if not finished and state is None:
        if out.is_dir() and any(path.name != UNFINISHED for path in out.iterdir()):
            raise UsageError(f"{out}: the directory is not empty and holds no shards of dupr.")
        return False
    asked = (recipe_digest(work.recipe), work.address)
    if is_task and state is not None and (state["recipe_digest"], state["source"]) == asked:
        return False  # the first task has listed the source for all
    mine = _fingerprint(work.recipe, survey(source, work.recipe)[1])
    if finished and _fingerprint_of(out) == mine and not (wrong := _damaged(out)):
        if state is not None and state["fingerprint"] == mine:
            shutil.rmtree(work.folder)  # an interruption between the last two steps
        return True
    if state is not None and state["fingerprint"] == mine:
        return False
    if not overwrite:
        if finished and _fingerprint_of(out) == mine:
            raise UsageError(
                f"{wrong} is missing or has another size, although the set is complete. Put it "
                f"back, or make the set anew with --overwrite."
            )
        what, advice = "shards", "Give another OUT, or --overwrite to replace them."
        if state is not None:
            what = "unfinished shards"
            advice = (
                "Give that command again to finish them, on the source as it was, or --overwrite "
                "to replace them."
            )
        raise UsageError(f"{out}: {what} of another source or recipe are there. {advice}")
    if state is not None:
        shutil.rmtree(work.folder)
    return False


def _fingerprint(recipe: PrepareRecipe, digest: str) -> str:
    """What decides the content of the shards: the recipe and the listing of the source."""
    return f"{recipe_digest(recipe)}-{digest}"


def _fingerprint_of(out: Path) -> str:
    try:
        return Manifest.read(out).fingerprint
    except UsageError:
        return "damaged"


def _damaged(out: Path) -> Path | None:
    """The first shard that is not as long as the manifest says."""
    for entries in Manifest.read(out).splits.values():
        for entry in entries:
            tar = out / entry.file
            if not tar.is_file() or tar.stat().st_size != entry.bytes:
                return tar
    return None


def _read_state(folder: Path) -> dict[str, Any] | None:
    """What is being prepared in `folder`; None where nothing is."""
    try:
        return dict(json.loads((folder / _STATE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _begun(out: Path, alone: bool) -> Iterator[None]:
    """Take away what was made for the output when it fails before anything is worth keeping.

    alone: whether no other task can be at work there.
    """
    made_out = not out.exists()
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not alone:
            raise
        if (out / UNFINISHED).is_dir() and _read_state(out / UNFINISHED) is None:
            shutil.rmtree(out / UNFINISHED)
        if made_out and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """No second process does the same in `folder`."""
    try:
        with FileLock(folder / f"{name}.lock", timeout=0):
            yield
    except Timeout:
        raise UsageError(
            f"{folder.parent}: another `dupr prepare` is writing here. Wait for its end, "
            f"or stop it."
        ) from None


def _listing(work: Work, source: ImageSource, reporter: Reporter) -> Listing:
    """The listing of the source: that of an earlier call or another task, or a new one."""
    folder = work.folder
    with FileLock(folder / "listing.lock"):  # tasks begin together
        listing = read_listing(folder)
        if listing is None or _read_state(folder) is None:
            reporter.detail(f"listing {work.address}")
            listing = write_listing(source, work.recipe, folder)
            if not listing.total:
                raise nothing_found(work.address)
            blocks_folder(folder).mkdir(exist_ok=True)
            state = {
                "fingerprint": _fingerprint(work.recipe, listing.digest),
                "recipe_digest": recipe_digest(work.recipe),
                "recipe": work.recipe.model_dump(mode="json"),
                "kind": work.kind,
                "source": work.address,
                "labelled": source.labelled,
                "dupr_version": __version__,
            }
            write_json(folder / _STATE, state)
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
        reporter.info(f"{work.out}: {done} of {total} images are in finished shards; going on")
    with reporter.task("prepare", total, "images", done) as progress:
        missing = [block for block in blocks if block not in finished]
        write_blocks(work, missing, engine, workers, source.remote, progress)


def _assemble(work: Work, listing: Listing, labelled: bool, reporter: Reporter) -> PrepareResult:
    duplicates = work.recipe.filter.duplicates
    if duplicates == "auto":
        duplicates = "keep" if labelled else "exact"
    fingerprint = _fingerprint(work.recipe, listing.digest)
    out = Path(work.out)
    manifest = assemble(work, listing, fingerprint, duplicates, reporter)
    if manifest.skipped:
        with (out / SKIPPED).open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        reporter.warning(
            f"{manifest.skipped} of {listing.total} images were left out, for example "
            f"{first['path']}: {first['reason']}; {out / SKIPPED} lists them"
        )
    for line in _label_notes(out):
        reporter.warning(f"{line}; {out / NOTES} lists them")
    return _result(out, manifest)


def _notes(source: ImageSource) -> list[str]:
    # Sources of other packages may have none.
    return list(getattr(source, "notes", ()))


def _label_notes(out: Path) -> list[str]:
    """What a finished preparation has to say of labels: how many of each kind, and the first."""
    if not (out / NOTES).is_file():
        return []
    with (out / NOTES).open(encoding="utf-8") as lines:
        return said([(entry["path"], entry["reason"]) for entry in map(json.loads, lines)])


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
    return PrepareResult(
        work.out, dict(samples), len(blocks), size, reasons.total(), dict(reasons), task
    )
