"""The demo's data set: generated scenes with labelled objects, written to folders.

A scene shows two to five glyphs of the font DejaVu Sans, which matplotlib ships, on a smooth random
ground. Six glyphs are the labelled classes, and the others only distract. The content of a scene
depends only on (seed, split, index), so any number of processes writes the same files on a given
machine.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import starmap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageFont

from dupr_cli.artifacts.labels import Box
from dupr_cli.runtime.stopping import deferred, ignore_signals, raise_if_stopped

CLASSES = {
    "airplane": "✈",
    "anchor": "⚓",
    "knight": "♞",
    "scissors": "✂",
    "telephone": "☎",
    "umbrella": "☂",
}
DISTRACTORS = "♚♛♜♝♟♠♣♥♦★☀☁☕☘☠☢☣☮☯☸☹☻♪♫♻⚑⚒⚖⚗⚙⚛⚡✉✌✎✒✔✘✚✪✱✸✿❄❖❤❦➔➤▲◆&@#?ABDEGKMQRSW2345689"
SIDE = 96  # of a scene, pixels
SMALLEST, LARGEST = 20, 40  # longer side of a glyph, pixels
_TURN = 20  # largest turn of a glyph either way, degrees
_OVERLAP = 0.1  # largest share of a glyph's square that another square may cover
_CONTRAST = 80  # smallest mean difference of a glyph from the ground below it, grey levels
_NOISE = 4  # standard deviation of each pixel's noise, grey levels

_Rng = np.random.Generator
_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_Square = tuple[int, int, int]  # left, top, side


def render_scene(seed: int, split: str, index: int) -> tuple[Image.Image, list[Box]]:
    """An RGB scene of 96 x 96 pixels and its labelled objects, at least one.

    seed, split, index: any values; each triple has its own scene. The boxes enclose the pixels
    that a glyph covers by at least half.
    """
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    pixels, boxes = _ground(rng), []
    for number, (left, top, side) in enumerate(_squares(rng)):
        names = list(CLASSES) if number == 0 or rng.random() < 0.5 else list(DISTRACTORS)
        name = names[rng.integers(len(names))]
        mask = _glyph(CLASSES.get(name, name), side, rng.uniform(-_TURN, _TURN))
        height, width = mask.shape
        below = pixels[top : top + height, left : left + width]
        below += mask[..., None] * (_fill(rng, below, mask) - below)
        if name in CLASSES:
            rows, columns = np.nonzero(mask >= 0.5)
            x_min, y_min = left + int(columns.min()), top + int(rows.min())
            x_max, y_max = left + int(columns.max()) + 1, top + int(rows.max()) + 1
            boxes.append(Box(name, x_min, y_min, x_max, y_max))
    pixels += _NOISE * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), boxes


def _ground(rng: _Rng) -> _Floats:
    """(96, 96, 3) grey levels: each channel blends two colours by three octaves of noise."""
    octaves = []
    for cells in (3, 6, 12):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        octaves.append(np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32))
    blend = (4 * octaves[0] + 2 * octaves[1] + octaves[2]) / (7 * 255)
    first = rng.uniform(0, 255, 3).astype(np.float32)
    # Two similar colours would leave no texture to tell patches of the ground apart.
    second = (first + rng.uniform(80, 175, 3).astype(np.float32)) % 255
    # Halving the saturation makes the glyphs stand out.
    first, second = (first + first.mean()) / 2, (second + second.mean()) / 2
    ground: _Floats = first + blend * (second - first)
    return ground


def _squares(rng: _Rng) -> list[_Square]:
    """Two to five squares inside the scene that hardly overlap."""
    wanted, squares = rng.integers(2, 6), list[_Square]()
    # In a crowded scene, a place for the last square may be hard to find.
    for _ in range(200):
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        left, top = rng.integers(0, SIDE - side + 1, 2).tolist()
        if all(_covered((left, top, side), square) <= _OVERLAP for square in squares):
            squares.append((left, top, side))
        if len(squares) == wanted:
            break
    return squares


def _covered(a: _Square, b: _Square) -> float:
    """Share of the smaller square that the other one covers."""
    across, down = (min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i]) for i in (0, 1))
    return max(0, across) * max(0, down) / min(a[2], b[2]) ** 2


@cache
def _large_glyph(character: str) -> Image.Image:
    """Coverage of the upright glyph as a grey picture, larger than any scene shows it."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    mask = ImageFont.truetype(path, 80, layout_engine=ImageFont.Layout.BASIC).getmask(character)
    return Image.frombytes("L", mask.size, bytes(mask))


def _glyph(character: str, side: int, angle: float) -> _Floats:
    """(H, W) coverage from 0 to 1 of a turned glyph.

    side: longer one of H and W, pixels. angle: degrees, anticlockwise.
    """
    turned = _large_glyph(character).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getbbox())
    scale = side / max(turned.size)
    size = (round(turned.width * scale), round(turned.height * scale))
    return np.asarray(turned.resize(size, Image.Resampling.BOX), np.float32) / np.float32(255)


def _fill(rng: _Rng, below: _Floats, mask: _Floats) -> _Floats:
    """(H, W, 3) gradient between two random colours that stand out from `below`.

    below: (H, W, 3) ground, grey levels. mask: (H, W) coverage of the glyph.
    """
    height, width = mask.shape
    across, down = rng.uniform(-1, 1, 2).astype(np.float32)
    ramp = across * np.linspace(-1, 1, width, dtype=np.float32)
    ramp = ramp + down * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    blend = ((ramp - ramp.min()) / np.ptp(ramp))[..., None]
    while True:
        first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        fill: _Floats = first + blend * (second - first)
        difference = np.abs(fill - below).mean(2)
        if (difference * mask).sum() >= _CONTRAST * mask.sum():
            return fill


def write_unlabelled(
    folder: Path,
    count: int,
    seed: int,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `count` scenes without labels: <folder>/scene-000000.jpg and so on.

    workers: processes that render; 0 renders in this one. A script that uses workers needs the
    `if __name__ == "__main__"` guard of multiprocessing.
    on_progress: called with the number of scenes written since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = scene_files(folder, count)
    jobs = [(file, seed, "unlabelled", index) for index, file in enumerate(files)]
    for _ in _written(jobs, workers):
        if on_progress:
            on_progress(1)


def write_voc_tree(
    root: Path,
    counts: Mapping[str, int],
    seed: int,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write labelled scenes as one year's folder of PASCAL VOC, such as VOCdevkit/VOC2007.

    counts: scenes by split. Image ids are unique over the splits: train_000000 and so on. Boxes
    count pixels from 1 and include both ends, as in VOC.
    workers, on_progress: as in `write_unlabelled`.
    """
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = [
        (root / "JPEGImages" / f"{key}.jpg", seed, split, index)
        for split, count in counts.items()
        for index, key in enumerate(_ids(split, count))
    ]
    for (file, *_), boxes in zip(jobs, _written(jobs, workers), strict=True):
        (root / "Annotations" / f"{file.stem}.xml").write_text(_annotation(file, boxes))
        if on_progress:
            on_progress(1)
    for split, count in counts.items():
        lines = "".join(f"{key}\n" for key in _ids(split, count))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)


def scene_files(folder: Path, count: int) -> list[Path]:
    """The files that `write_unlabelled` writes."""
    return [folder / f"scene-{index:06d}.jpg" for index in range(count)]


def voc_tree_files(root: Path, counts: Mapping[str, int]) -> list[Path]:
    """The files that `write_voc_tree` writes."""
    keys = [key for split, count in counts.items() for key in _ids(split, count)]
    return [
        *(root / "JPEGImages" / f"{key}.jpg" for key in keys),
        *(root / "Annotations" / f"{key}.xml" for key in keys),
        *(root / "ImageSets" / "Main" / f"{split}.txt" for split in counts),
    ]


def _ids(split: str, count: int) -> list[str]:
    return [f"{split}_{index:06d}" for index in range(count)]


def _written(jobs: Sequence[tuple[Path, int, str, int]], workers: int) -> Iterator[list[Box]]:
    """Run `_write_scene` on each job; yields its results in order."""
    if workers == 0:
        yield from starmap(_write_scene, jobs)
        return
    # The caller may run threads, which a plain fork would copy in mid-work.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with deferred(), ProcessPoolExecutor(workers, context, ignore_signals) as pool:
        try:
            for boxes in pool.map(_write_scene, *zip(*jobs, strict=True), chunksize=32):
                raise_if_stopped()
                yield boxes
        finally:
            pool.shutdown(cancel_futures=True)


def _write_scene(file: Path, seed: int, split: str, index: int) -> list[Box]:
    picture, boxes = render_scene(seed, split, index)
    picture.save(file, quality=95, subsampling=0)
    return boxes


def _annotation(file: Path, boxes: Sequence[Box]) -> str:
    """VOC's annotation of an image, as XML."""
    objects = "".join(
        f"  <object>\n    <name>{box.name}</name>\n    <difficult>0</difficult>\n    <bndbox>"
        # Convert from 0-based half-open to 1-based with both ends included.
        f"<xmin>{box.x_min + 1:.0f}</xmin><ymin>{box.y_min + 1:.0f}</ymin>"
        f"<xmax>{box.x_max:.0f}</xmax><ymax>{box.y_max:.0f}</ymax></bndbox>\n  </object>\n"
        for box in boxes
    )
    return (
        f"<annotation>\n  <filename>{file.name}</filename>\n  <size><width>{SIDE}</width>"
        f"<height>{SIDE}</height><depth>3</depth></size>\n{objects}</annotation>\n"
    )
