"""The demo's data set: generated scenes with labelled objects, written to folders.

A scene is a cluttered background, clutter, one to four objects of the classes, more clutter, and a
camera: exposure, white balance, uneven light, blur and noise. Its content depends only on (seed,
split, index, size), so any number of processes writes the same files on a given machine. No label
is ever left out: an object that would hide another beyond recognition is moved elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dupr_cli.demo.canvas import Light
from dupr_cli.demo.clutter import draw_clutter
from dupr_cli.demo.composition import Composition, Placed, photograph
from dupr_cli.demo.shapes import KINDS, draw
from dupr_cli.demo.textures import Palette, Plane
from dupr_cli.runtime.stopping import deferred, ignore_signals, raise_if_stopped

CLASSES: tuple[str, ...] = tuple(KINDS)

# Longest side of an object relative to the side of the image.
_SMALLEST, _LARGEST = 0.18, 0.6
# A pixel belongs to a silhouette if at least this share of it is covered.
_COVERED = 0.4
# Objects are difficult below this visible share, and truncated above this hidden share.
_DIFFICULT = 0.35
_OCCLUDED = 0.15
_JPEG_QUALITY = 92
_CHUNK = 32


@dataclass(frozen=True)
class SceneObject:
    """A labelled object.

    box: (x_min, y_min, x_max, y_max) of its silhouette inside the image, hidden parts included, in
    0-based half-open pixels. difficult: less than 35 % of it can be seen. truncated: the border
    cuts it, or more than 15 % of it is hidden.
    """

    name: str
    box: tuple[int, int, int, int]
    difficult: bool
    truncated: bool


def _label(placed: Placed) -> SceneObject:
    inside, seen = float(placed.silhouette.sum()), float(placed.seen.sum())
    cut = inside < 0.995 * placed.area
    return SceneObject(
        name=placed.name,
        box=_tight_box(placed.silhouette),
        difficult=seen < _DIFFICULT * placed.area,
        truncated=cut or seen < (1 - _OCCLUDED) * inside,
    )


def _tight_box(silhouette: Plane) -> tuple[int, int, int, int]:
    """Half-open pixel box that a silhouette covers."""
    covered = silhouette >= _COVERED
    (columns,) = np.nonzero(covered.any(0))
    (rows,) = np.nonzero(covered.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _compose(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, list[Placed]]:
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    palette, sun = Palette.draw(rng), Light.draw(rng)

    def colours() -> Palette:
        # Half of all things share the scene's colours, so that colour alone reveals nothing.
        return palette if rng.random() < 0.5 else Palette.draw(rng)

    def clutter(count: int, largest: float) -> None:
        for _ in range(count):
            side = size * rng.uniform(0.08, largest)
            scene.put(draw_clutter(side, rng, colours(), sun))

    scene = Composition(size, rng, palette, sun)
    clutter(int(rng.integers(2, 7)), 0.45)
    wanted = int(rng.choice(4, p=(0.25, 0.35, 0.25, 0.15))) + 1
    # Small objects are more frequent than large ones, as in photographs.
    span = np.log(_LARGEST / _SMALLEST)
    while wanted > 0 or not scene.placed:
        name = CLASSES[int(rng.integers(len(CLASSES)))]
        side = size * _SMALLEST * float(np.exp(rng.uniform(0, span)))
        placed = scene.put(draw(name, side, rng, colours(), sun), name)
        wanted -= 1
        if placed and rng.random() < 0.25:
            clutter(1, 0.25)
    clutter(int(rng.integers(0, 3)), 0.25)
    return photograph(scene.light, rng), scene.placed


def render_scene(
    seed: int, split: str, index: int, size: int = 160
) -> tuple[Image.Image, list[SceneObject]]:
    """A scene and its objects, at least one, from back to front.

    seed, split, index: any values; each triple has its own scene. size: side of the square RGB
    picture, pixels, at least 64.
    """
    if size < 64:
        raise ValueError(f"size is {size}, but objects need scenes of at least 64 pixels")
    picture, placed = _compose(seed, split, index, size)
    return picture, [_label(p) for p in placed]


def write_unlabelled(
    folder: Path,
    count: int,
    seed: int,
    size: int = 160,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `count` scenes without labels: <folder>/scene-000000.jpg and so on.

    size: side of the pictures, pixels. workers: processes that render; 0 renders in this one. A
    script that uses workers needs the `if __name__ == "__main__"` guard of multiprocessing.
    on_progress: called at times with the number of scenes written since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(folder, "unlabelled", "scene-", numbers, seed, size) for numbers in _chunks(count)]
    for written in _carried_out(jobs, workers):
        if on_progress:
            on_progress(len(written))


def write_voc_tree(
    root: Path,
    counts: Mapping[str, int],
    seed: int,
    size: int = 160,
    workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write labelled scenes as one year's folder of PASCAL VOC, such as VOCdevkit/VOC2007.

    counts: scenes by split. Image ids are unique over the splits: train_000000 and so on. Boxes
    count pixels from 1 and include both ends, as in VOC.
    size, workers, on_progress: as in `write_unlabelled`.
    """
    lists = root / "ImageSets" / "Main"
    for folder in (root / "JPEGImages", root / "Annotations", lists):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(root / "JPEGImages", split, f"{split}_", numbers, seed, size, root / "Annotations")
        for split, count in counts.items()
        for numbers in _chunks(count)
    ]
    labels: dict[str, dict[str, list[SceneObject]]] = {split: {} for split in counts}
    for job, written in zip(jobs, _carried_out(jobs, workers), strict=True):
        labels[job.split] |= written
        if on_progress:
            on_progress(len(written))
    for split, images in labels.items():
        for name in CLASSES:
            lines = (f"{key} {_presence(name, objects):2d}\n" for key, objects in images.items())
            _write(lists / f"{name}_{split}.txt", "".join(lines).encode())
        _write(lists / f"{split}.txt", "".join(f"{key}\n" for key in images).encode())


def scene_files(folder: Path, count: int) -> list[Path]:
    """The files that `write_unlabelled` writes."""
    return [folder / f"scene-{number:06d}.jpg" for number in range(count)]


def voc_tree_files(root: Path, counts: Mapping[str, int]) -> list[Path]:
    """The files that `write_voc_tree` writes."""
    lists = root / "ImageSets" / "Main"
    files = []
    for split, count in counts.items():
        keys = [f"{split}_{number:06d}" for number in range(count)]
        files += [root / "JPEGImages" / f"{key}.jpg" for key in keys]
        files += [root / "Annotations" / f"{key}.xml" for key in keys]
        files += [lists / f"{split}.txt", *(lists / f"{name}_{split}.txt" for name in CLASSES)]
    return files


@dataclass(frozen=True)
class _Job:
    """Scenes for one process to render and write. annotations: None for no labels."""

    images: Path
    split: str
    prefix: str
    numbers: range
    seed: int
    size: int
    annotations: Path | None = None


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _carried_out(jobs: Sequence[_Job], workers: int) -> Iterator[dict[str, list[SceneObject]]]:
    """Run `_carry_out` on each job; yields its results in order."""
    if workers == 0:
        yield from map(_carry_out, jobs)
        return
    # The caller may run threads, which a plain fork would copy in mid-work.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with deferred(), ProcessPoolExecutor(workers, context, ignore_signals) as pool:
        try:
            for written in pool.map(_carry_out, jobs):
                raise_if_stopped()
                yield written
        finally:
            pool.shutdown(cancel_futures=True)


def _carry_out(job: _Job) -> dict[str, list[SceneObject]]:
    """Write a job's files; returns the objects by image id."""
    written = {}
    for number in job.numbers:
        key = f"{job.prefix}{number:06d}"
        picture, objects = render_scene(job.seed, job.split, number, job.size)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        _write(job.images / f"{key}.jpg", buffer.getvalue())
        if job.annotations:
            xml = _annotation(job.annotations.parent.name, key, objects, job.size)
            _write(job.annotations / f"{key}.xml", xml)
        written[key] = objects
    return written


def _write(path: Path, data: bytes) -> None:
    # The file appears whole or not at all; flushing it is unnecessary, as it can be made again.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _presence(name: str, objects: Sequence[SceneObject]) -> int:
    """VOC's flag of a class in an image: 1 present, -1 absent, 0 if all are difficult."""
    difficult = [o.difficult for o in objects if o.name == name]
    if not difficult:
        return -1
    return 0 if all(difficult) else 1


def _annotation(folder: str, key: str, objects: Sequence[SceneObject], size: int) -> bytes:
    root = ET.Element("annotation")

    def add(parent: ET.Element, **texts: str | int) -> None:
        for tag, text in texts.items():
            ET.SubElement(parent, tag).text = str(text)

    add(root, folder=folder, filename=f"{key}.jpg")
    add(ET.SubElement(root, "source"), database="dupr demo", annotation="generated", image="drawn")
    add(ET.SubElement(root, "size"), width=size, height=size, depth=3)
    add(root, segmented=0)
    for item in objects:
        element = ET.SubElement(root, "object")
        add(element, name=item.name, pose="Unspecified")
        add(element, truncated=int(item.truncated), difficult=int(item.difficult))
        x_min, y_min, x_max, y_max = item.box
        corners = ET.SubElement(element, "bndbox")
        # Convert from 0-based half-open to 1-based with both ends included.
        add(corners, xmin=x_min + 1, ymin=y_min + 1, xmax=x_max, ymax=y_max)
    ET.indent(root, "\t")
    return ET.tostring(root) + b"\n"
