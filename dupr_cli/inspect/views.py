"""Pairs of views with their patch grids, as pre-training makes them.

Each row shows an image with both crops, then its two views with the grid of the shared region.
Cells with the same colour and number show the same place: with the patch loss they are a positive
pair. A mirrored view is recognisable by its numbers.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import as_picture, how_shown
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.errors import UsageError
from dupr_cli.inspect.sheet import (
    SIDE,
    VIEW_COLOURS,
    as_panel,
    describe_view,
    sheet,
    source_panel,
    write_picture,
)
from dupr_cli.pretrain.data import ViewPairs, decode, held_out
from dupr_cli.pretrain.retrieval_check import retrieval_levels
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.recipe.base import LEVEL_STRIDES, Level
from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.views.augmentation import augment
from dupr_cli.views.geometry import shared_region_boxes

_NUMBER = 24  # pixels of the picture that a number needs, in both directions


def draw_views(path: Path, recipe: PretrainRecipe, data: str | Path, count: int = 6) -> list[str]:
    """Write a PNG of `count` images' view pairs, with the bins of the finest patch level.

    data: shards, as for `dupr pretrain`. The images are held-out images; if these are too few,
    the first other images follow. Returns the keys of the images drawn.
    Raises UsageError when no image can be decoded.
    """
    shards = open_shards(str(data), recipe.data.split)
    method, size = recipe.method, recipe.method.views.size
    pairs = ViewPairs(shards, method, recipe.seed)
    level = max(retrieval_levels(method), key=lambda v: _bins(method, v))
    bins = _bins(method, level)
    rows, keys = [], []
    for number, image in _images(shards, recipe.data.holdout, count):
        sample = pairs((0, number))
        flips = sample.flips[None]
        boxes, valid = shared_region_boxes(
            sample.crops[None], flips, size, method.views.min_overlap
        )
        views = augment(sample.views.clone(), sample.parameters, method.augmentation)
        key = shards[number].key
        panels = [
            (source_panel(image, sample.crops), f"{key}, {image.width} x {image.height} pixels")
        ]
        sides = (boxes[0, :, 2:] - boxes[0, :, :2]) * (SIDE / size / bins)
        every = max(1, math.ceil(_NUMBER / float(sides.min())))  # the same cells in both views
        for view in range(2):
            box, flipped = boxes[0, view], bool(flips[0, view])
            panel = _view(
                as_panel(views[view], method.augmentation, shards.pixels is None),
                box * (SIDE / size),
                flipped,
                bins if bool(valid[0]) else 0,
                every,
                VIEW_COLOURS[view],
            )
            shared = (box[2:] - box[:2]) / size if bool(valid[0]) else None
            panels.append((panel, describe_view(sample.crops[view], flipped, shared)))
        rows.append(panels)
        keys.append(key)
    if not rows:
        raise UsageError(f"{data}: no image could be decoded.")
    heads = ("image with both crops", f"view 1, {size} pixels", f"view 2, {size} pixels")
    title = f"grid: {bins} x {bins} bins of {level}; the same number and colour is the same place"
    if shards.pixels is not None:
        title += f"; shown: {how_shown(shards.pixels)}"
    write_picture(sheet(title, heads, rows), path)
    return keys


def _bins(method: MethodSection, level: Level) -> int:
    """The bins of a level; without a patch loss, those of the retrieval check."""
    cells = method.views.size // LEVEL_STRIDES[level]
    return method.patch.bins.get(level, max(1, cells))


def _images(shards: ShardSet, holdout: int, count: int) -> Iterator[tuple[int, Image.Image]]:
    """Numbers and images, held-out ones first, evenly spread; damaged images are left out.

    They are spread because shards are often sorted by class.
    """
    held = held_out(len(shards), holdout)
    places = np.linspace(0, len(held) - 1, min(count, len(held))).round().astype(int)
    chosen = dict.fromkeys(map(int, held[places]))
    order = [*chosen, *(number for number in range(len(shards)) if number not in chosen)]
    drawn = 0
    for number in order:
        if drawn == count:
            return
        try:
            image = as_picture(decode(shards[number]))
        except IMAGE_ERRORS:
            continue
        drawn += 1
        yield number, image


def _view(
    image: Image.Image, box: Tensor, flipped: bool, bins: int, every: int, frame: str
) -> Image.Image:
    """One view with its grid; every `every`th cell is numbered, in both directions.

    bins 0 draws no grid (too little is shared).
    """
    overlay = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(overlay)
    x0, y0, x1, y1 = box.tolist()
    font = ImageFont.load_default(13)
    for i in range(bins):
        for j in range(bins):
            # Bin j of a mirrored view counts from the right, so it shows the same place.
            column = bins - 1 - j if flipped else j
            left, right = (x0 + (x1 - x0) * k / bins for k in (column, column + 1))
            top, bottom = (y0 + (y1 - y0) * k / bins for k in (i, i + 1))
            number = i * bins + j
            numbered = i % every == 0 and j % every == 0
            r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(number / bins**2, 0.9, 1.0))
            draw.rectangle(
                [left + 1, top + 1, max(left + 1, right - 1), max(top + 1, bottom - 1)],
                fill=(r, g, b, 110 if numbered and every > 1 else 30),
                outline=(r, g, b, 255 if numbered else 110),
            )
    draw.rectangle([0, 0, image.width - 1, image.height - 1], outline=frame, width=3)
    for i in range(0, bins, every):
        for j in range(0, bins, every):
            column = bins - 1 - j if flipped else j
            draw.text(
                (x0 + (x1 - x0) * (column + 0.5) / bins, y0 + (y1 - y0) * (i + 0.5) / bins),
                str(i * bins + j),
                fill="white",
                stroke_fill="black",
                stroke_width=1,
                font=font,
                anchor="mm",
            )
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")
