"""Runs `blocks.write_block` in this process, in a pool of processes, or on a Ray cluster.

The engines differ in where the blocks are written and in how progress is reported.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from threading import Thread
from typing import Any

from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.blocks import BlockReport, Work, write_block
from dupr_cli.progress import Task
from dupr_cli.runtime.ray_cluster import ray_cluster, require_ray
from dupr_cli.runtime.stopping import deferred, ignore_signals, raise_if_stopped

Block = tuple[str, int]
ENGINES = ("processes", "ray")

# Images that each process requests from a server at the same time.
REMOTE_THREADS = 16
_POLL_SECONDS = 0.2
WORKER_BYTES = 120 * 2**20  # that a worker takes, seen with photographs
# How long workers may take to finish their current images after a signal.
_GRACE_SECONDS = 2.0


def check_engine(engine: str) -> None:
    """Raises UsageError when the engine is unknown or its package is not installed."""
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: use {' or '.join(ENGINES)}.")
    if engine == "ray":
        require_ray()


def write_blocks(
    work: Work, blocks: Sequence[Block], engine: str, workers: int, remote: bool, progress: Task
) -> None:
    """Write all of `blocks`; `progress` counts their images.

    engine: processes or ray. workers: processes, 0 for one per core. remote: images come from a
    server. Raises OSError when the output cannot be written.
    """
    if not blocks:
        return
    if engine == "ray":
        _on_ray(work, blocks, remote, progress)
        return
    workers = workers or os.cpu_count() or 1
    processes = min(workers, len(blocks))
    # With fewer blocks than workers, several threads share a block.
    threads = -(-workers // processes) * (REMOTE_THREADS if remote else 1)
    if processes > 1:
        _in_processes(work, blocks, processes, threads, progress)
        return

    def advance(count: int) -> None:
        raise_if_stopped()
        progress.advance(count)

    for block in blocks:
        write_block(work, block, threads, advance)


def _in_processes(
    work: Work, blocks: Sequence[Block], processes: int, threads: int, progress: Task
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all workers
    images, stop = context.Value("Q", 0), context.Event()
    with (
        deferred(),
        ProcessPoolExecutor(processes, context, _start_worker, (os.getpid(), images, stop)) as pool,
    ):
        waiting: set[Future[BlockReport]] = set()
        counted, remaining = 0, iter(blocks)
        try:
            while True:
                # Only a few are submitted at a time: a hundred thousand futures are not free.
                while len(waiting) < 2 * processes and (block := next(remaining, None)):
                    waiting.add(pool.submit(_write_in_worker, work, block, threads))
                if not waiting:
                    break
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                raise_if_stopped()
                for future in done:
                    future.result()
                # Without its lock, which a worker that was killed may hold for ever.
                if (now := images.get_obj().value) > counted:
                    progress.advance(now - counted)
                    counted = now
        except BrokenProcessPool:
            # The pool asks the others to end and waits for them. They may wait for a lock that the
            # killed one held, and they ignore signals.
            _end_workers(0)
            raise RunError(
                "a worker process was killed, most likely because memory ran out. Give the same "
                "command again with fewer --workers to continue."
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _end_workers(_GRACE_SECONDS)
            raise


def _end_workers(grace: float) -> None:
    """Kill the workers that are still running after so many seconds.

    A worker that reads a file from a server that hangs never sees that it must stop. What it was
    writing is written again when the command continues.
    """
    ends = time.monotonic() + grace
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.join(max(0.0, ends - time.monotonic()))
    for worker in workers:
        worker.kill()


class _StoppedError(Exception):
    """Raised in a worker that must stop in the middle of a block."""


def _nothing(_count: int) -> None:
    pass


# Counts images of this worker; `_start_worker` sets it.
_advance: Callable[[int], None] = _nothing


def _start_worker(main: int, images: Any, stop: Any) -> None:
    ignore_signals()
    Thread(target=_exit_after, args=(main,), daemon=True).start()

    def advance(count: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with images.get_lock():
            images.value += count

    global _advance
    _advance = advance


def _exit_after(main: int) -> None:
    """Exit once the main process has been killed: the worker would wait for work for ever."""
    with suppress(ProcessLookupError):
        while True:
            os.kill(main, 0)  # signal 0 only checks that the process exists
            time.sleep(1)
    os._exit(1)


def _write_in_worker(work: Work, block: Block, threads: int) -> BlockReport:
    return write_block(work, block, threads, _advance)


def _on_ray(work: Work, blocks: Sequence[Block], remote: bool, progress: Task) -> None:
    """Run blocks as tasks of a Ray cluster, whose machines must all see source and output."""
    threads = REMOTE_THREADS if remote else 1
    with ray_cluster() as ray:
        write = ray.remote(num_cpus=1, max_retries=2)(write_block)
        shared = ray.put(work)
        cores = int(ray.cluster_resources().get("CPU", 1))
        waiting: list[Any] = []
        remaining = iter(blocks)
        while True:
            while len(waiting) < 2 * cores and (block := next(remaining, None)):
                waiting.append(write.remote(shared, block, threads))
            if not waiting:
                break
            done, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
            for report in ray.get(done):
                progress.advance(report.images)
