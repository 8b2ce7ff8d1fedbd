"""Which patches a network re-identifies: heat maps of similarity over the other view.

Two views of every image are cut as in pre-training. A patch of the first view is compared with all
places of the second view, and with those of another image. For each image come first the ranks of
all its patches (1 is found: no patch of any second view is more similar than its own), then the
patch with the best and the one with the worst rank, then chosen or random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, as_picture
from dupr_cli.datasets.tensors import as_tensor
from dupr_cli.errors import UsageError
from dupr_cli.inspect.heat import heat_panel
from dupr_cli.inspect.network import Network
from dupr_cli.inspect.sheet import (
    SIDE,
    VIEW_COLOURS,
    Panel,
    as_panel,
    sheet,
    source_panel,
    write_picture,
)
from dupr_cli.recipe.base import Level
from dupr_cli.views.augmentation import augment
from dupr_cli.views.geometry import shared_region_boxes
from dupr_cli.views.pairs import ViewPairBatch, cut_pair
from dupr_cli.views.retrieval import own_ranks

_ATTEMPTS = 50  # pairs of views drawn to find one that shares enough, and shows the chosen patches
_MOST_BINS = 56  # along a side of a heat map
# Of the palette of Okabe and Ito: found, nearly, not.
_FOUND, _NEAR, _LOST = (0, 114, 178), (86, 180, 233), (213, 94, 0)
_NEARLY = 5


@dataclass(frozen=True)
class PatchMatch:
    """One patch of a first view at one level.

    chosen: best, worst, random or given. x, y: centre in the source image, pixels. rank: 1 if its
    own patch is the most similar of all `pool` patches of the second views. similarity: cosine with
    its own patch; peak: with the most similar place of the heat map over the second view; other:
    over another image, None if only one was given. found: the peak lies in its own patch.
    """

    image: str
    chosen: str
    level: str
    x: float
    y: float
    rank: int
    pool: int
    similarity: float
    peak: float
    found: bool
    other: float | None


@dataclass(frozen=True)
class Matches:
    """note: what was compared. found: share of all patches with rank 1, percent by level."""

    path: str
    shows: list[str]
    note: str
    found: dict[str, float]
    patches: list[PatchMatch]


@dataclass(frozen=True)
class Pairs:
    """View pairs with their patches. views: (N, 2, C, S, S) normalised. boxes: (N, 2, 4).

    first, second: by level, (N, S * S, D), of the bins of the shared region. ranks: by level,
    (N, S * S), from 1.
    """

    names: list[str]
    images: list[AnyImage]
    crops: Tensor
    flips: Tensor
    boxes: Tensor
    views: Tensor
    first: dict[Level, Tensor]
    second: dict[Level, Tensor]
    ranks: dict[Level, Tensor]


def draw_matches(
    path: Path,
    network: Network,
    images: Sequence[tuple[str, AnyImage]],
    places: Sequence[tuple[float, float]] = (),
    count: int = 1,
    seed: int = 0,
) -> Matches:
    """Write a PNG; see the module. images: with their names.

    places: patches to show, x and y in fractions of the image if both are at most 1, otherwise in
    pixels. Without any, `count` random patches of each image. Raises UsageError when the views of
    an image cannot be cut so that both show the patches.
    """
    pairs = cut_pairs(network, images, places, seed)
    random = np.random.default_rng(seed)
    rows: list[list[Panel]] = []
    patches: list[PatchMatch] = []
    for number in range(len(pairs.names)):
        rows.append(_ranks_row(pairs, network, number))
        for chosen, place in _chosen(pairs, network, number, places, count, random):
            row, found = _patch_row(pairs, network, number, chosen, place)
            rows.append(row)
            patches += found
    levels = network.levels
    found_share: dict[str, float] = {
        v: float((pairs.ranks[v] == 1).double().mean() * 100) for v in levels
    }
    heads = ["view 1: the patch", *(f"{v}: similarity in view 2" for v in levels)]
    if len(pairs.names) > 1:
        heads += [f"{v}: similarity in another image" for v in levels]
    shares = ", ".join(f"{v} {share:.0f} %" for v, share in found_share.items())
    title = (
        f"{network.note}; patches with rank 1: {shares}\n"
        f"square: the patch's own place; cross: the most similar place; yellow is similar\n"
        f"ranks: blue is 1 (found), light blue up to {_NEARLY}, orange beyond"
    )
    write_picture(sheet(title, heads, rows), path)
    return Matches(str(path), pairs.names, network.note, found_share, patches)


def cut_pairs(
    network: Network,
    images: Sequence[tuple[str, AnyImage]],
    places: Sequence[tuple[float, float]],
    seed: int,
) -> Pairs:
    """Two views of every image that share enough, embedded. places, raises: see `draw_matches`."""
    method, size = network.method, network.method.views.size
    samples = []
    for number, (name, image) in enumerate(images):
        pixels = as_tensor(image)
        points = [_pixels(place, image) for place in places]
        for attempt in range(_ATTEMPTS):
            random = np.random.default_rng([seed, number, attempt])
            together = method.augmentation.flip_together
            sample = cut_pair(
                pixels, method.views, method.augmentation, random, number, 0, together
            )
            if _shows(sample, size, method.views.min_overlap, points):
                break
        else:
            problem = "shares enough for patches. Choose another --seed or another image."
            if places:
                problem = "shows the places of --patch twice. Choose some nearer to its centre."
            raise UsageError(f"{name}: of {_ATTEMPTS} drawn pairs of views, none {problem}")
        samples.append(sample)
    batch = ViewPairBatch.stack(samples)
    boxes, _ = shared_region_boxes(batch.crops, batch.flips, size, method.views.min_overlap)
    views = torch.stack(
        [
            augment(batch.views[:, view].clone(), batch.parameters[:, view], method.augmentation)
            for view in range(2)
        ],
        dim=1,
    )
    bins = {level: network.bins(level) for level in network.levels}
    first, second = (
        network.patches(views[:, view], boxes[:, view], batch.flips[:, view], bins)
        for view in range(2)
    )
    ranks = {
        level: own_ranks(first[level].flatten(0, 1), second[level].flatten(0, 1)).view(
            len(samples), -1
        )
        + 1
        for level in network.levels
    }
    names, opened = [name for name, _ in images], [image for _, image in images]
    return Pairs(names, opened, batch.crops, batch.flips, boxes, views, first, second, ranks)


def _pixels(place: tuple[float, float], image: AnyImage) -> tuple[float, float]:
    """A place in pixels. Raises UsageError when it lies outside of the image."""
    x, y = place
    if x <= 1 and y <= 1:
        x, y = x * image.width, y * image.height
    if not (0 <= x <= image.width and 0 <= y <= image.height):
        raise UsageError(
            f"--patch {place[0]:g},{place[1]:g}: outside of an image of {image.width} x "
            f"{image.height} pixels. Give pixels, or fractions up to 1."
        )
    return x, y


def _shows(
    sample: ViewPairBatch, size: int, min_overlap: float, points: Sequence[tuple[float, float]]
) -> bool:
    """Whether both views of one image share enough, and show all points of the source image."""
    crops = sample.crops
    _, valid = shared_region_boxes(crops[None], sample.flips[None], size, min_overlap)
    region = _region(crops)
    inside = [region[0] <= x < region[2] and region[1] <= y < region[3] for x, y in points]
    return bool(valid[0]) and all(inside)


def _region(crops: Tensor) -> tuple[float, float, float, float]:
    """What both crops (2, 4) show, x0, y0, x1, y1 in the source image."""
    x0, y0 = crops[:, :2].amax(0).tolist()
    x1, y1 = crops[:, 2:].amin(0).tolist()
    return x0, y0, x1, y1


def _chosen(
    pairs: Pairs,
    network: Network,
    number: int,
    places: Sequence[tuple[float, float]],
    count: int,
    random: np.random.Generator,
) -> list[tuple[str, tuple[float, float]]]:
    """The patches of an image that are shown, as (why, place in the source image)."""
    level = max(network.levels, key=network.bins)
    bins, ranks = network.bins(level), pairs.ranks[level][number]
    own = (pairs.first[level][number] * pairs.second[level][number]).sum(1)
    # Of equal ranks, the most similar is best and the least similar is worst.
    order = np.lexsort((-own.cpu().numpy(), ranks.cpu().numpy()))
    chosen = [("best", int(order[0]))]
    if bins > 1:
        chosen.append(("worst", int(order[-1])))
    x0, y0, x1, y1 = _region(pairs.crops[number])

    def centre(patch: int) -> tuple[float, float]:
        row, column = divmod(patch, bins)
        return x0 + (x1 - x0) * (column + 0.5) / bins, y0 + (y1 - y0) * (row + 0.5) / bins

    found = [(why, centre(patch)) for why, patch in chosen]
    if places:
        return found + [("given", _pixels(place, pairs.images[number])) for place in places]
    drawn = random.choice(bins**2, min(count, bins**2), replace=False)
    return found + [("random", centre(int(patch))) for patch in drawn]


def bin_box(box: Tensor, flipped: bool, bins: int, patch: int) -> tuple[float, float, float, float]:
    """Where a bin of the shared region `box` (4,) lies in its view: x0, y0, x1, y1 in pixels."""
    row, column = divmod(patch, bins)
    if flipped:  # the bins of a mirrored view count from the right
        column = bins - 1 - column
    x0, y0, x1, y1 = box.tolist()
    wide, high = (x1 - x0) / bins, (y1 - y0) / bins
    return x0 + wide * column, y0 + high * row, x0 + wide * (column + 1), y0 + high * (row + 1)


def similarity_map(
    network: Network, view: Tensor, level: Level, query: Tensor, side: float
) -> NDArray[np.float32]:
    """Cosine similarity (h, h) of a patch with all places of a view.

    view: (C, S, S) normalised. query: (D,). side: of the patch in this view, pixels; the places
    that are compared are about as large, so that like is compared with like.
    """
    size = view.shape[-1]
    bins = min(_MOST_BINS, max(1, round(size / side)))
    whole = torch.tensor([[0.0, 0.0, size, size]])
    no_flip = torch.zeros(1, dtype=torch.bool)
    patches = network.patches(view[None], whole, no_flip, {level: bins})[level][0]
    found: NDArray[np.float32] = (patches @ query).view(bins, bins).cpu().numpy()
    return found


def _patch_row(
    pairs: Pairs, network: Network, number: int, chosen: str, place: tuple[float, float]
) -> tuple[list[Panel], list[PatchMatch]]:
    """The panels of one patch, and what was measured at each level."""
    size = network.method.views.size
    scale = SIDE / size
    x0, y0, x1, y1 = _region(pairs.crops[number])
    other = (number + 1) % len(pairs.names)
    query_panel = _view_panel(pairs, network, number, 0)
    here: list[Panel] = []
    elsewhere: list[Panel] = []
    found: list[PatchMatch] = []
    for level in network.levels:
        bins = network.bins(level)
        column = min(bins - 1, int(bins * (place[0] - x0) / (x1 - x0)))
        row = min(bins - 1, int(bins * (place[1] - y0) / (y1 - y0)))
        patch = row * bins + column
        boxes = [
            bin_box(pairs.boxes[number, view], bool(pairs.flips[number, view]), bins, patch)
            for view in range(2)
        ]
        _frame(query_panel, boxes[0], scale, "white")
        query = pairs.first[level][number, patch]
        side = (boxes[1][2] - boxes[1][0] + boxes[1][3] - boxes[1][1]) / 2
        maps = [similarity_map(network, pairs.views[number, 1], level, query, side)]
        if other != number:
            maps.append(similarity_map(network, pairs.views[other, 1], level, query, side))
        limits = (min(float(m.min()) for m in maps), max(float(m.max()) for m in maps))
        peaks = [_peak(values, size) for values in maps]
        own = float(query @ pairs.second[level][number, patch])
        rank = int(pairs.ranks[level][number, patch])
        pool = pairs.ranks[level].numel()
        bx0, by0, bx1, by1 = boxes[1]
        match = PatchMatch(
            image=pairs.names[number],
            chosen=chosen,
            level=level,
            x=round(place[0], 1),
            y=round(place[1], 1),
            rank=rank,
            pool=pool,
            similarity=own,
            peak=float(maps[0].max()),
            found=bx0 <= peaks[0][0] <= bx1 and by0 <= peaks[0][1] <= by1,
            other=float(maps[1].max()) if other != number else None,
        )
        found.append(match)
        for view_of, values, peak, into in zip(
            (number, other), maps, peaks, (here, elsewhere), strict=False
        ):
            panel = heat_panel(_view_panel(pairs, network, view_of, 1), values, limits)
            if view_of == number:
                _frame(panel, boxes[1], scale, "white")
                caption = f"rank {rank} of {pool}, own {own:.2f}, best place {match.peak:.2f}"
            else:
                caption = f"{pairs.names[other]}: best place {match.other:.2f}"
            _cross(panel, peak, scale)
            into.append((panel, caption))
    caption = f"{chosen} patch at {place[0]:.0f}, {place[1]:.0f}"
    return [(query_panel, caption), *here, *elsewhere], found


def _peak(values: NDArray[np.float32], size: int) -> tuple[float, float]:
    """x and y of the centre of the most similar place, in pixels of a view."""
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    return (float(column) + 0.5) * size / len(values), (float(row) + 0.5) * size / len(values)


def _view_panel(pairs: Pairs, network: Network, number: int, view: int) -> Image.Image:
    rgb = network.taken.input.pixels is None
    return as_panel(pairs.views[number, view], network.method.augmentation, rgb)


def _ranks_row(pairs: Pairs, network: Network, number: int) -> list[Panel]:
    """The image with both crops, and for each level the first view with the ranks of its bins."""
    image = as_picture(pairs.images[number])
    caption = f"{pairs.names[number]}, {image.width} x {image.height} pixels"
    panels = [(source_panel(image, pairs.crops[number]), caption)]
    for level in network.levels:
        ranks = pairs.ranks[level][number]
        panel = _rank_panel(
            _view_panel(pairs, network, number, 0),
            pairs.boxes[number, 0] * (SIDE / network.method.views.size),
            bool(pairs.flips[number, 0]),
            ranks,
            network.bins(level),
        )
        share = float((ranks == 1).double().mean())
        panels.append((panel, f"{level}: ranks of the patches of view 1, {share:.0%} found"))
    return panels


def _rank_panel(
    panel: Image.Image, box: Tensor, flipped: bool, ranks: Tensor, bins: int
) -> Image.Image:
    overlay = Image.new("RGBA", panel.size)
    draw = ImageDraw.Draw(overlay)
    corners = [bin_box(box, flipped, bins, patch) for patch in range(bins**2)]
    room = corners[0][2] - corners[0][0]
    font = ImageFont.load_default(max(8.0, min(14.0, room / 2.2)))
    for (x0, y0, x1, y1), rank in zip(corners, ranks.tolist(), strict=True):
        colour = _FOUND if rank == 1 else _NEAR if rank <= _NEARLY else _LOST
        draw.rectangle(
            [x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], fill=(*colour, 110), outline=(*colour, 255)
        )
        if font.getlength(str(rank)) + 2 <= room:
            draw.text(
                ((x0 + x1) / 2, (y0 + y1) / 2), str(rank), "white", font, "mm",
                stroke_width=1, stroke_fill="black",
            )  # fmt: skip
    draw.rectangle([0, 0, SIDE - 1, SIDE - 1], outline=VIEW_COLOURS[0], width=3)
    return Image.alpha_composite(panel.convert("RGBA"), overlay).convert("RGB")


def _frame(
    panel: Image.Image, box: tuple[float, float, float, float], scale: float, colour: str
) -> None:
    """A square that is seen on bright and on dark ground, and whole at the panel's edge."""
    x0, y0, x1, y1 = (min(max(scale * edge, 1), SIDE - 2) for edge in box)
    draw = ImageDraw.Draw(panel)
    draw.rectangle([x0 - 1, y0 - 1, x1 + 1, y1 + 1], outline="black", width=4)
    draw.rectangle([x0, y0, x1, y1], outline=colour, width=2)


def _cross(panel: Image.Image, place: tuple[float, float], scale: float) -> None:
    x, y = scale * place[0], scale * place[1]
    draw = ImageDraw.Draw(panel)
    for colour, width in (("black", 5), ("white", 2)):
        draw.line([x - 7, y - 7, x + 7, y + 7], fill=colour, width=width)
        draw.line([x - 7, y + 7, x + 7, y - 7], fill=colour, width=width)
