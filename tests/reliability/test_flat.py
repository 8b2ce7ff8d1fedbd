"""Memory and open files of long work do not grow: 10,000 steps, and 200,000 images prepared."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.support.images import noise_image, write_shards
from tests.support.memory import resident
from tests.support.recipes import SMALL_NETWORK, TINY

STEPS, IMAGES = 10_000, 200_000


def handles(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def watched(command: Sequence[object], every: float = 1.0) -> list[tuple[float, float, int]]:
    """Run `python -m dupr_cli ...`; seconds, resident MiB of all processes, and open files."""
    words = [sys.executable, "-m", "dupr_cli", *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    begun, seen = time.monotonic(), []
    while process.poll() is None:
        try:
            seen.append((time.monotonic() - begun, resident(process.pid), handles(process.pid)))
        except FileNotFoundError:
            break  # it ended meanwhile
        time.sleep(every)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return seen


def growth(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Growth over the whole time, and half its 95 % interval, of a line through the points.

    The points are first averaged in 20 stretches, because neighbours are not independent.
    """
    times, levels = (
        np.array([part.mean() for part in np.array_split(np.asarray(of, float), 20)])
        for of in (seconds, values)
    )
    fitted, covariance = np.polyfit(times, levels, 1, cov=True)
    span = times[-1] - times[0]
    return float(fitted[0] * span), float(2.1 * covariance[0, 0] ** 0.5 * span)


def assert_flat(what: str, seen: list[tuple[float, float, int]]) -> None:
    """After the first third, in which caches fill."""
    kept = seen[len(seen) // 3 :]
    seconds = [at for at, _, _ in kept]
    for name, values, allowed in (
        ("MiB", [memory for _, memory, _ in kept], 0.03),
        ("open files", [float(count) for _, _, count in kept], 0.03),
    ):
        level = statistics.median(values)
        grown, interval = growth(seconds, values)
        print(
            f"{what}: {level:.0f} {name}, grown by {grown:+.1f} +- {interval:.1f} "
            f"in {seconds[-1] - seconds[0]:.0f} s"
        )
        assert grown - interval < allowed * level, f"{what}: {name} grow by {grown:.1f}"


def test_ten_thousand_steps(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 200)
    overrides = [
        *TINY, SMALL_NETWORK, "data.workers=1", "train.log_every=50", "train.probe_every=1000",
        "train.checkpoint_every=500",
    ]  # fmt: skip
    seen = watched(
        ["pretrain", "dupr-r18-cpu-smoke", "--data", shards, "--out", tmp_path / "run", "--steps",
         STEPS, *(word for override in overrides for word in ("--set", override))]
    )  # fmt: skip
    assert_flat(f"pretrain, {STEPS} steps", seen)


def test_two_hundred_thousand_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in range(IMAGES // 1000):
        (source / f"{folder:03d}").mkdir(parents=True)
    for number in range(IMAGES):
        # Each has its own bytes, and so its own digests.
        path = source / f"{number % 200:03d}" / f"{number:06d}.bmp"
        noise_image(number, 8, 8).save(path)
    seen = watched(
        ["prepare", source, tmp_path / "out", "--workers", 2, "--set", "image.min_side=8"]
    )
    assert_flat(f"prepare, {IMAGES} files", seen)
