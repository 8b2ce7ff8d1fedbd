"""Pairs of views with their patch grids, as pre-training makes them.

Each row shows an image with both crops, then its two views with the grid of the shared region.
Cells of the same colour and number are a positive pair; a mirrored view shows in its numbers.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.pretrain.augmentation import FLIP, augment
from dupr_cli.pretrain.data import ViewPairs, decode, held_out
from dupr_cli.pretrain.geometry import shared_region_boxes
from dupr_cli.pretrain.probe import retrieval_levels
from dupr_cli.recipe import PretrainRecipe

_SIDE, _MARGIN, _HEADER = 256, 10, 30
_COLOURS = ("#ff7f0e", "#1f77b4")  # first and second view


def draw_views(path: Path, recipe: PretrainRecipe, data: str, count: int = 6) -> None:
    """Write a PNG of `count` held-out images' view pairs, with the bins of the finest patch level.

    data: shards, as for `dupr pretrain`.
    """
    shards = open_shards(data)
    method = recipe.method
    pairs = ViewPairs(shards, method, recipe.seed)
    level = max(retrieval_levels(method), key=lambda v: method.patch.bins[v])
    bins, size = method.patch.bins[level], method.views.size
    numbers = held_out(len(shards), max(count * 10, recipe.data.holdout))[:count]
    sheet = Image.new(
        "RGB",
        (3 * (_SIDE + _MARGIN) + _MARGIN, len(numbers) * (_SIDE + _MARGIN) + _HEADER),
        "white",
    )
    font = ImageFont.load_default(14)
    heads = ("image and crops", "view 1", f"view 2 ({bins} x {bins} bins of {level})")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        draw.text((_MARGIN + column * (_SIDE + _MARGIN), 8), text, fill="black", font=font)
    for row, number in enumerate(int(n) for n in numbers):
        sample = pairs[0, number]
        flips = sample.parameters[None, :, FLIP].bool()
        boxes, valid = shared_region_boxes(
            sample.crops[None], flips, size, method.views.min_overlap
        )
        images = augment(sample.views.clone(), sample.parameters, method.augmentation)
        panels = [_source(decode(shards[number].image), sample.crops)]
        for view in range(2):
            panels.append(
                _view(
                    _to_image(images[view], recipe),
                    boxes[0, view] * (_SIDE / size),
                    bool(flips[0, view]),
                    bins if bool(valid[0]) else 0,
                    _COLOURS[view],
                )
            )
        for column, panel in enumerate(panels):
            place = (_MARGIN + column * (_SIDE + _MARGIN), _HEADER + row * (_SIDE + _MARGIN))
            sheet.paste(panel, place)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _to_image(pixels: Tensor, recipe: PretrainRecipe) -> Image.Image:
    """A normalised view (3, S, S) as a picture."""
    mean, std = (torch.tensor(v)[:, None, None] for v in _statistics(recipe))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(shown).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _statistics(recipe: PretrainRecipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return recipe.method.augmentation.mean, recipe.method.augmentation.std


def _source(image: Image.Image, crops: Tensor) -> Image.Image:
    scale = _SIDE / max(image.size)
    panel = Image.new("RGB", (_SIDE, _SIDE), "white")
    size = (round(image.width * scale), round(image.height * scale))
    panel.paste(image.resize(size, Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(panel)
    for crop, colour in zip(crops, _COLOURS, strict=True):
        x0, y0, x1, y1 = (crop * scale).tolist()
        draw.rectangle([x0, y0, x1 - 1, y1 - 1], outline=colour, width=3)
    return panel


def _view(image: Image.Image, box: Tensor, flipped: bool, bins: int, frame: str) -> Image.Image:
    """One view with its grid; bins 0 draws none (too little is shared)."""
    overlay = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(overlay)
    x0, y0, x1, y1 = box.tolist()
    font = ImageFont.load_default(max(8, min(13, int((x1 - x0) / max(1, bins) / 2.5))))
    for i in range(bins):
        for j in range(bins):
            # Bin j of a mirrored view is counted from the right: it shows the same place.
            column = bins - 1 - j if flipped else j
            left, right = (x0 + (x1 - x0) * k / bins for k in (column, column + 1))
            top, bottom = (y0 + (y1 - y0) * k / bins for k in (i, i + 1))
            number = i * bins + j
            r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(number / bins**2, 0.9, 1.0))
            draw.rectangle([left, top, right, bottom], fill=(r, g, b, 26), outline=(r, g, b, 255))
            draw.text((left + 2, top + 1), str(number), fill=(255, 255, 255, 255), font=font)
    draw.rectangle([0, 0, image.width - 1, image.height - 1], outline=frame, width=3)
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")
