"""From items to finished shards: in parallel, in the order of the source, resumable.

Workers decode; the main process takes their samples in order and fills one shard after the other.
So shards do not depend on the number of workers, every shard but a split's last is full, and the
index of a finished shard tells how far into the source it reaches: an interrupted call goes on
there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread

from dupr_cli import __version__
from dupr_cli.artifacts.files import remove_leftovers, write_json
from dupr_cli.artifacts.shards import (
    MANIFEST,
    SKIPPED,
    UNFINISHED,
    Manifest,
    Sample,
    ShardEntry,
    ShardIndex,
    ShardWriter,
    Skipped,
    index_path,
    shard_name,
    write_skipped,
)
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare import PrepareResult
from dupr_cli.prepare.ingest import ingest
from dupr_cli.prepare.sources import Item, Source
from dupr_cli.progress import Reporter, Task
from dupr_cli.recipe import PrepareRecipe, recipe_digest
from dupr_cli.recipe.prepare import ImageSection

_CHUNK = 16  # items per message to a worker
_AHEAD = 4  # chunks per worker that may wait to be taken: bounds memory


def fingerprint(recipe: PrepareRecipe, source: Source) -> str:
    """What decides the content of the shards: the recipe and the listing of the source."""
    return f"{recipe_digest(recipe)}-{source.digest}"


def check_output(recipe: PrepareRecipe, source: Source, out: Path, overwrite: bool) -> bool:
    """Whether `out` is finished already. Raises UsageError when it holds something else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is there; OUT is a directory.")
    if out.resolve() == source.address.resolve():
        raise UsageError(f"{out}: OUT is the source itself; give another directory.")
    mine = fingerprint(recipe, source)
    if (out / MANIFEST).is_file():
        try:
            there = Manifest.read(out).fingerprint
        except UsageError:
            there = "damaged"
        if there == mine:
            return True
        if not overwrite:
            raise UsageError(
                f"{out}: shards of another source or recipe are there. Give another OUT, or "
                f"--overwrite to replace them."
            )
    elif (out / UNFINISHED).is_file():
        if _read_unfinished(out) != mine and not overwrite:
            raise UsageError(
                f"{out}: unfinished shards of another source or recipe are there. Give that "
                f"command again to finish them, or --overwrite to replace them."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: the directory is not empty and holds no shards of dupr.")
    return False


def _read_unfinished(out: Path) -> str:
    try:
        return str(json.loads((out / UNFINISHED).read_bytes())["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return "damaged"


def _clear(out: Path) -> None:
    """Remove what prepare wrote, the manifest first, and nothing else."""
    try:
        splits = Manifest.read(out).splits
        tars = [out / entry.file for entries in splits.values() for entry in entries]
        shards = [path for tar in tars for path in (tar, index_path(tar))]
    except UsageError:  # not written yet, or damaged: by the names that shards have
        numbered = "*-[0-9][0-9][0-9][0-9][0-9][0-9]"
        shards = [*out.glob(f"{numbered}.tar"), *out.glob(f"{numbered}.index.json")]
    for path in (out / MANIFEST, out / SKIPPED, *shards, out / UNFINISHED):
        path.unlink(missing_ok=True)


def write_all(
    recipe: PrepareRecipe,
    source: Source,
    out: Path,
    workers: int,
    overwrite: bool,
    reporter: Reporter,
) -> PrepareResult:
    """Write every split of `source` into `out`; see `dupr_cli.prepare.run`."""
    if check_output(recipe, source, out, overwrite):
        reporter.info(f"{out} is complete already; nothing to do")
        return _result(out, Manifest.read(out))
    mine = fingerprint(recipe, source)
    out.mkdir(parents=True, exist_ok=True)
    resumed = (out / UNFINISHED).is_file() and _read_unfinished(out) == mine
    if not resumed:
        _clear(out)
        write_json(out / UNFINISHED, {"fingerprint": mine, "dupr_version": __version__})
    remove_leftovers(out)
    total = sum(len(items) for items in source.splits.values())
    done = {split: _finished_shards(out, split) for split in source.splits} if resumed else {}
    before = sum(indexes[-1].source_end for indexes in done.values() if indexes)
    if before:
        reporter.info(f"{out}: {before} of {total} images are in finished shards; going on")
    splits: dict[str, list[ShardEntry]] = {}
    skipped: list[Skipped] = []
    classes: set[str] = set()
    with (
        _decoders(recipe.image, workers) as decode,
        reporter.task("prepare", total, "images", before) as progress,
    ):
        for split, items in source.splits.items():
            indexes = list(done.get(split, []))
            start = indexes[-1].source_end if indexes else 0
            for index in _write_split(
                out, split, decode(items[start:]), recipe, len(indexes), start, progress
            ):
                indexes.append(index)
            splits[split] = [
                ShardEntry(shard_name(split, n), len(index), index.bytes, index.sha256)
                for n, index in enumerate(indexes)
                if len(index)
            ]
            skipped += [entry for index in indexes for entry in index.skipped]
            classes |= {name for index in indexes for name in index.classes}
    if not any(splits.values()):
        first = skipped[0]
        _clear(out)
        raise RunError(
            f"{source.address}: none of {total} images could be used; the first, {first.path}: "
            f"{first.reason}."
        )
    reasons = Counter(entry.reason.partition(":")[0] for entry in skipped)
    manifest = Manifest(
        splits=splits,
        classes=sorted(classes),
        skipped=len(skipped),
        skip_reasons=dict(reasons.most_common()),
        source=str(source.address),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=mine,
        dupr_version=__version__,
    )
    for split in source.splits:
        # An index without samples has told what was skipped behind the last shard.
        index_path(out / shard_name(split, len(splits[split]))).unlink(missing_ok=True)
    write_skipped(out, skipped)
    manifest.write(out)
    (out / UNFINISHED).unlink(missing_ok=True)
    if skipped:
        reporter.warning(
            f"{len(skipped)} of {total} files were left out, for example {skipped[0].path}: "
            f"{skipped[0].reason}; {out / SKIPPED} lists them"
        )
    return _result(out, manifest)


def _finished_shards(out: Path, split: str) -> list[ShardIndex]:
    """Indexes of the whole shards that an interrupted call left, from the first on."""
    indexes: list[ShardIndex] = []
    while True:
        tar = out / shard_name(split, len(indexes))
        beside = index_path(tar)
        try:
            index = ShardIndex.read(beside) if beside.is_file() else None
        except RunError:
            index = None
        if index is None or (len(index) and not _is_size(tar, index.bytes)):
            return indexes
        indexes.append(index)


def _is_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_split(
    out: Path,
    split: str,
    ingested: Iterator[Sample | Skipped],
    recipe: PrepareRecipe,
    first_shard: int,
    start: int,
    progress: Task,
) -> Iterator[ShardIndex]:
    """Fill shards from `ingested`; yields the index of each as it is finished.

    start: position in the source of the first item. The last index may hold no samples, only what
    was skipped behind the last full shard; then there is no tar.
    """
    number, position = first_shard, start
    writer, skipped = ShardWriter(out / shard_name(split, number)), list[Skipped]()
    keys: set[str] = set()
    try:
        for result in ingested:
            position += 1
            progress.advance(1)
            if isinstance(result, Skipped):
                skipped.append(result)
            # Within a shard, where equal keys would read as one sample; more would not fit memory.
            elif result.key in keys:
                skipped.append(Skipped(result.source, f"listed twice: key {result.key}"))
            else:
                keys.add(result.key)
                writer.add(result)
            if len(writer) == recipe.shard.max_samples:
                yield writer.finish(position, skipped)
                number += 1
                writer, skipped = ShardWriter(out / shard_name(split, number)), []
                keys = set()
        if len(writer) or skipped:
            yield writer.finish(position, skipped)
    except BaseException:
        writer.abandon()
        raise


def _ingest_chunk(recipe: ImageSection, items: Sequence[Item]) -> list[Sample | Skipped]:
    return [ingest(item, recipe) for item in items]


def _start_worker(main: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    """A pool's worker would wait for work for ever when the main process is killed."""
    with suppress(ProcessLookupError):
        while True:
            os.kill(main, 0)  # asks whether it is there
            time.sleep(1)
    os._exit(1)


class _Decode:
    """Ingests items in order, ahead of their use, in worker processes or in this one."""

    def __init__(self, recipe: ImageSection, pool: ProcessPoolExecutor | None, workers: int):
        self._work = partial(_ingest_chunk, recipe)
        self._pool, self._workers = pool, workers

    def __call__(self, items: Sequence[Item]) -> Iterator[Sample | Skipped]:
        chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
        if self._pool is None:
            for chunk in chunks:
                yield from self._work(chunk)
            return
        waiting: deque[Future[list[Sample | Skipped]]] = deque()
        for chunk in chunks:
            waiting.append(self._pool.submit(self._work, chunk))
            if len(waiting) > _AHEAD * self._workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


@contextmanager
def _decoders(recipe: ImageSection, workers: int) -> Iterator[_Decode]:
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield _Decode(recipe, None, 1)
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
    )
    try:
        yield _Decode(recipe, pool, workers)
    finally:
        pool.shutdown(cancel_futures=True)


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
