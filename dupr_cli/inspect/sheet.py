"""Sheets of square panels with captions, and the panels that several pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.pixel_formats import ChannelImage
from dupr_cli.outside_text import one_line
from dupr_cli.picture_text import shortened, shortened_end
from dupr_cli.recipe.pretrain import AugmentationSection

SIDE = 300  # pixels of a panel
VIEW_COLOURS = ("#ff7f0e", "#1f77b4")  # first and second view
INK, GROUND = "#222222", "#eeeeee"
_MARGIN, _CAPTION, _HEADER = 14, 24, 58

Panel = tuple[Image.Image, str]  # a square picture and its caption


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, and the folders that its path needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, "PNG")


def sheet(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[Panel]], side: int = SIDE
) -> Image.Image:
    """Rows of panels below the heads of their columns. A row may have fewer panels than heads."""
    step = side + _MARGIN
    heading, head_font, font = (ImageFont.load_default(points) for points in (16, 14, 12))
    lines = title.split("\n")
    header = _HEADER + 22 * (len(lines) - 1)
    height = header + len(rows) * (side + _CAPTION)
    width = len(heads) * step + _MARGIN
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        shown = shortened_end(one_line(line), heading, width - 2 * _MARGIN)
        draw.text((_MARGIN, 18 + 22 * number), shown, INK, heading, anchor="lm")
    for column, head in enumerate(heads):
        place = (_MARGIN + column * step, header - 14)
        draw.text(place, shortened_end(head, head_font, side), INK, head_font, anchor="lm")
    for row, panels in enumerate(rows):
        top = header + row * (side + _CAPTION)
        for column, (panel, caption) in enumerate(panels):
            left = _MARGIN + column * step
            picture.paste(panel, (left, top))
            place = (left, top + side + _CAPTION // 2 - 1)
            draw.text(place, shortened(one_line(caption), font, side), INK, font, anchor="lm")
    return picture


def as_panel(
    pixels: Tensor, normalised: AugmentationSection, rgb: bool, side: int = SIDE
) -> Image.Image:
    """A normalised view (C, S, S) as a picture. rgb: C is 3, red, green and blue."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalised.mean, normalised.std))
    values = (pixels.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
    if rgb:
        picture = Image.fromarray((values * 255).byte().numpy())
    else:
        picture = ChannelImage(values.numpy()).shown()
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def letterboxed(image: Image.Image, side: int = SIDE) -> tuple[Image.Image, float, int, int]:
    """The image centred in a panel; the scale, and the left and upper edge of the image in it."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    left, top = ((side - length) // 2 for length in size)
    panel = Image.new("RGB", (side, side), GROUND)
    panel.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
    return panel, scale, left, top


def source_panel(image: Image.Image, crops: Tensor) -> Image.Image:
    """The image in its panel, its crops framed and their shared region brightened."""
    panel, scale, left, top = letterboxed(image)
    overlay = Image.new("RGBA", panel.size)
    draw = ImageDraw.Draw(overlay)
    frames = crops * scale + torch.tensor([left, top, left - 1, top - 1])
    x0, y0 = frames[:, :2].amax(0).tolist()
    x1, y1 = frames[:, 2:].amin(0).tolist()
    if x0 < x1 and y0 < y1:
        draw.rectangle([x0, y0, x1, y1], fill=(255, 255, 255, 70))
    for frame, colour in zip(frames, VIEW_COLOURS, strict=True):
        draw.rectangle(frame.tolist(), outline=colour, width=3)
    return Image.alpha_composite(panel.convert("RGBA"), overlay).convert("RGB")


def describe_view(crop: Tensor, flipped: bool, shared: Tensor | None) -> str:
    """A view in words. crop: (4,) in source pixels. shared: (2,) share of its sides, or None."""
    width, height = (crop[2:] - crop[:2]).tolist()
    parts = [f"{width:.0f} x {height:.0f} cropped"]
    if flipped:
        parts.append("mirrored")
    if shared is None:
        parts.append("too little shared")
    else:
        parts.append(f"{shared[0]:.0%} x {shared[1]:.0%} shared")
    return ", ".join(parts)
