"""dupr prepare beside tar and the plain loop of webdataset's documentation, on the same files.

    make bench, or with the real photographs and full sizes:
    DUPR_BENCH=full pytest -s tests/benchmarks/test_prepare.py --override-ini addopts= \
        --override-ini norecursedirs=.git

Whole processes are timed, from start to exit, one after the other; memory is the sum over a process
and its children, sampled. docs/benchmarks.md says what was seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.images import SHARED_DATA, encode, noise_image
from tests.support.memory import resident

FULL = os.environ.get("DUPR_BENCH") == "full"
PHOTOGRAPHS = (10_000, 100_000) if FULL else (1_000, 2_000)
ENTRIES = (10_000, 100_000, 1_000_000) if FULL else (1_000, 10_000)

PLAIN = """
import io, sys, webdataset
from pathlib import Path
from PIL import Image

source, pattern, mode = sys.argv[1:]
with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0) as sink:
    for path in sorted(Path(source).iterdir()):
        data = path.read_bytes()
        if mode == "decode":
            Image.open(io.BytesIO(data)).load()
        if mode == "resize":
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = 256 / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            buffer = io.BytesIO()
            image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
            data = buffer.getvalue()
        sink.write({"__key__": path.stem, "jpg": data})
"""


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a command."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    return seconds, peak


def prepare(source: Path, out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "dupr_cli", "prepare", str(source), str(out), "--quiet"]
    return [*words, *(word for option in options for word in ("--set", option))]


def cropped(folder: Path, number: int) -> None:
    """A photograph of its own: one of the real ones (or of blobs), cut a little differently."""
    photographs = sorted((SHARED_DATA / "photos_500px").glob("*.JPEG"))
    if photographs:
        image = Image.open(photographs[number % len(photographs)]).convert("RGB")
    else:
        image = noise_image(number % 120, 500, 375)
    shift = number // (len(photographs) or 120)
    x, y = shift % 30, shift // 30
    cut = image.crop((x, y, image.width - 30 + x, image.height - 30 + y))
    cut.save(folder / f"{number:06d}.jpg", quality=90)


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(cropped, folder), range(count), chunksize=100))
    return folder


def report(title: str, rows: dict[str, tuple[float, float]], count: int) -> None:
    print(f"\n{title}, {count:,} images")
    for name, (seconds, peak) in rows.items():
        print(f"  {name:<34} {count / seconds:8.0f} images/s {peak:8.0f} MiB")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_beside_tar_and_the_plain_loop(folder: Path) -> None:
    few, many = PHOTOGRAPHS
    source = photographs(folder / "few", few)
    plain = folder / "plain.py"
    plain.write_text(PLAIN)
    out = folder / "out"
    tar = ["tar", "cf", str(folder / "all.tar"), str(source)]
    forms = {
        "tar": tar,
        "plain loop, bytes only": [sys.executable, str(plain), str(source), "", "bytes"],
        "plain loop, decoded": [sys.executable, str(plain), str(source), "", "decode"],
        "plain loop, resized": [sys.executable, str(plain), str(source), "", "resize"],
        "dupr keep, header": prepare(source, out, "image.verify=header"),
        "dupr keep, one in twenty": prepare(source, out, "image.verify=sampled"),
        "dupr keep, all decoded": prepare(source, out),
        "dupr resized": prepare(source, out, "image.min_side=256"),
    }
    rows = {}
    for name, command in forms.items():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        words = [str(out / "plain-%06d.tar") if word == "" else word for word in command]
        measured(tar)  # the files are in the page cache for all
        rows[name] = measured(words)
    report("prepare, 2 workers", rows, few)

    def speed(name: str, other: str) -> float:
        return rows[other][0] / rows[name][0]

    print(f"  keep, header:      {speed('dupr keep, header', 'tar'):.2f} of tar's speed")
    print(f"  keep, sampled:     {speed('dupr keep, one in twenty', 'tar'):.2f} of tar's speed")
    print(f"  keep, all decoded: x{speed('dupr keep, all decoded', 'plain loop, decoded'):.2f}")
    print(f"  resized:           x{speed('dupr resized', 'plain loop, resized'):.2f}")
    source = photographs(folder / "many", many)
    tar[-1] = str(source)
    measured(tar)
    rows = {"tar": measured(tar)}
    (folder / "all.tar").unlink()
    for name, option in (("keep, header", "image.verify=header"),
                         ("keep, one in twenty", "image.verify=sampled"),
                         ("keep, all decoded", "image.verify=full"),
                         ("resized", "image.min_side=256")):  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)
        rows[f"dupr {name}"] = measured(prepare(source, out, option))
    report("prepare, 2 workers", rows, many)
    print(f"  keep, header:      {speed('dupr keep, header', 'tar'):.2f} of tar's speed")
    print(f"  keep, sampled:     {speed('dupr keep, one in twenty', 'tar'):.2f} of tar's speed")
    shutil.rmtree(folder / "many")


def tiny(folder: Path, numbers: range) -> None:
    place = folder / f"{numbers.start:07d}"
    place.mkdir()
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (place / f"{number}.png").write_bytes(encode(Image.fromarray(pixels), "PNG"))


def test_time_per_image_of_long_lists(folder: Path) -> None:
    images = folder / "tiny"
    images.mkdir()
    parts = [range(start, start + 1000) for start in range(0, ENTRIES[-1], 1000)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(tiny, images), parts))
    names = (f"tiny/{part.start:07d}/{number}.png" for part in parts for number in part)
    everything = list(islice(names, ENTRIES[-1]))
    print()
    for count in ENTRIES:
        listed = folder / f"{count}.txt"
        listed.write_text("\n".join(everything[:count]))
        out = folder / f"out-{count}"
        seconds, peak = measured(prepare(listed, out, "shard.max_samples=10000"))
        print(
            f"prepare of {count:>9,} listed tiny images: {seconds:7.1f} s, "
            f"{1e6 * seconds / count:6.0f} us an image, {peak:.0f} MiB"
        )
        assert (out / "skipped.jsonl").read_text() == ""
        shutil.rmtree(out)
