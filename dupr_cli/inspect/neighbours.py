"""The nearest patches over a set of images, for a few query patches.

Each image is cut to its largest centred square, in the size of the run's views and without
augmentation, and its map is pooled into the patches of one level. The neighbours of a patch are
those of other images with the highest cosine similarity, at most one of each image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import ChannelImage
from dupr_cli.datasets.tensors import as_tensor
from dupr_cli.errors import UsageError
from dupr_cli.inspect.network import Network
from dupr_cli.inspect.sheet import Panel, sheet, write_picture
from dupr_cli.probe.data import ImageSet
from dupr_cli.progress import Reporter
from dupr_cli.recipe.base import Level
from dupr_cli.views.augmentation import normalise
from dupr_cli.views.pairs import crop_and_resize

_BATCH = 32
_SIDE = 130  # pixels of a panel
_CONTEXT = 2.0  # side of a crop, in sides of its patch


@dataclass(frozen=True)
class Neighbour:
    """A patch of another image. x, y: its centre, in fractions of the image's centred square."""

    image: str
    x: float
    y: float
    similarity: float


@dataclass(frozen=True)
class Query:
    """A patch and its nearest patches, the most similar first."""

    image: str
    x: float
    y: float
    nearest: list[Neighbour]


@dataclass(frozen=True)
class Neighbours:
    """images, patches: numbers of those that were searched. note: what was compared."""

    path: str
    note: str
    level: str
    images: int
    patches: int
    queries: list[Query]


def draw_neighbours(
    path: Path,
    network: Network,
    images: ImageSet,
    reporter: Reporter,
    level: Level | None = None,
    queries: int = 6,
    shown: int = 8,
    limit: int = 500,
    seed: int = 0,
) -> Neighbours:
    """Write a PNG; see the module.

    level: by default the deepest that is compared. limit: a seeded choice of so many images is
    searched. Raises UsageError when there are fewer than two images, or the level has no patches.
    """
    level = level or network.levels[-1]
    if level not in network.levels:
        raise UsageError(
            f"--level {level}: patches are compared at {', '.join(network.levels)}. Choose one."
        )
    searched = images.drawn(limit, seed, 0)
    if len(searched) < 2:
        raise UsageError(f"{images.address}: neighbours need at least two images.")
    side = max(1, network.method.views.size // network.frozen.shape.strides[level])
    with reporter.task("embed patches", len(searched), "images") as progress:
        parts = []
        for first in range(0, len(searched), _BATCH):
            numbers = range(first, min(len(searched), first + _BATCH))
            squares = torch.stack([_square(network, searched, number) for number in numbers])
            parts.append(_embedded(network, squares, level, side).cpu())
            progress.advance(len(numbers))
    pool = torch.cat(parts)  # (images, side * side, D)
    random = np.random.default_rng(seed)
    chosen = random.choice(len(searched), min(queries, len(searched)), replace=False)
    places = random.integers(side**2, size=len(chosen))
    rows, found = [], []
    for number, patch in zip(chosen.tolist(), places.tolist(), strict=True):
        query = _nearest(searched, pool, number, patch, shown, side)
        found.append(query)
        rows.append(_row(network, searched, query, side))
    heads = ["query", *(f"nearest {i}" for i in range(1, 1 + min(shown, len(searched) - 1)))]
    title = (
        f"{level}, {network.note}\n{len(searched)} images, {pool.shape[0] * pool.shape[1]} patches "
        f"searched; one patch of each image"
    )
    write_picture(sheet(title, heads, rows, _SIDE), path)
    count = pool.shape[0] * pool.shape[1]
    return Neighbours(str(path), network.note, level, len(searched), count, found)


def _square(network: Network, images: ImageSet, number: int) -> Tensor:
    """The largest centred square of an image (C, S, S) in the size of a view."""
    pixels = as_tensor(images.image(number))
    height, width = pixels.shape[1:]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    size = network.method.views.size
    return crop_and_resize(pixels, (left, top, left + side, top + side), size)


def _embedded(network: Network, squares: Tensor, level: Level, side: int) -> Tensor:
    """Patches (N, side * side, D) of squares (N, C, S, S) as `_square` gives them."""
    values = squares.float() / 255 if squares.dtype == torch.uint8 else squares
    size = float(squares.shape[-1])
    whole = torch.tensor([[0.0, 0.0, size, size]]).expand(len(squares), -1)
    no_flips = torch.zeros(len(squares), dtype=torch.bool)
    normalised = normalise(values, network.method.augmentation)
    return network.patches(normalised, whole, no_flips, {level: side})[level]


def _nearest(
    images: ImageSet, pool: Tensor, number: int, patch: int, shown: int, side: int
) -> Query:
    similarity, best = (pool @ pool[number, patch]).max(1)  # the best patch of every image
    similarity[number] = -torch.inf
    order = similarity.argsort(descending=True)[: min(shown, len(images) - 1)].tolist()
    nearest = [
        Neighbour(images.ids[i], *_centre(int(best[i]), side), float(similarity[i])) for i in order
    ]
    return Query(images.ids[number], *_centre(patch, side), nearest)


def _centre(patch: int, side: int) -> tuple[float, float]:
    row, column = divmod(patch, side)
    return (column + 0.5) / side, (row + 0.5) / side


def _row(network: Network, images: ImageSet, query: Query, side: int) -> list[Panel]:
    panels = [(_crop(network, images, query.image, query.x, query.y, side), query.image)]
    for each in query.nearest:
        panel = _crop(network, images, each.image, each.x, each.y, side)
        panels.append((panel, f"{each.similarity:.3f}"))
    return panels


def _crop(
    network: Network, images: ImageSet, name: str, x: float, y: float, side: int
) -> Image.Image:
    """A patch with what is around it, framed."""
    square = _square(network, images, images.ids.index(name))
    values = square.permute(1, 2, 0).numpy()
    whole = Image.fromarray(values) if square.dtype == torch.uint8 else ChannelImage(values).shown()
    size = whole.width
    reach = min(size, size / side * _CONTEXT)
    left = min(max(0.0, x * size - reach / 2), size - reach)
    top = min(max(0.0, y * size - reach / 2), size - reach)
    box = (left, top, left + reach, top + reach)
    panel = whole.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box)
    scale, half = _SIDE / reach, size / side / 2
    frame = [
        scale * (x * size - half - left), scale * (y * size - half - top),
        scale * (x * size + half - left) - 1, scale * (y * size + half - top) - 1,
    ]  # fmt: skip
    draw = ImageDraw.Draw(panel)
    draw.rectangle(frame, outline="black", width=4)
    draw.rectangle([edge + 1 for edge in frame[:2]] + [edge - 1 for edge in frame[2:]],
                   outline="white", width=2)  # fmt: skip
    return panel
