"""Draws a contact sheet of shards: images as stored, with their boxes if they are labelled."""

from __future__ import annotations

import colorsys
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from dupr_cli.artifacts.files import atomic_file
from dupr_cli.artifacts.pixel_formats import PixelFormat, as_picture
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.datasets.channels import decode_as
from dupr_cli.datasets.pixels import open_picture
from dupr_cli.outside_text import one_line

_CELL, _CAPTION, _GAP = 200, 18, 6
_GROUND, _INK = "#eeeeee", "#222222"


@dataclass(frozen=True)
class View:
    """path: of the PNG. keys: of the samples it shows, row by row. pixels: of images that keep
    their channels, of which the picture shows at most three."""

    path: str
    keys: list[str]
    pixels: PixelFormat | None = None


def draw_sheet(address: str | Path, split: str | None, path: Path, count: int, seed: int) -> View:
    """Write a PNG of `count` samples, chosen at random by `seed`, in the order of the shards."""
    shards = open_shards(str(address), split)
    shards.cached_indexes = 8
    chosen = sorted(Random(seed).sample(range(len(shards)), min(count, len(shards))))
    samples = [shards[number] for number in chosen]
    columns = min(len(samples), max(1, round(math.sqrt(len(samples) * 1.6))))
    rows = -(-len(samples) // columns)
    step = (_CELL + _GAP, _CELL + _CAPTION + _GAP)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), _GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, sample in enumerate(samples):
        left, top = (
            _GAP + step[0] * (number % columns),
            _GAP + step[1] * (number // columns),
        )
        cell = _cell(sample)
        sheet.paste(cell, (left + (_CELL - cell.width) // 2, top + (_CELL - cell.height) // 2))
        draw.text((left, top + _CELL + 2), _short(one_line(sample.key)), _INK, font)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
    return View(str(path), [sample.key for sample in samples], shards.pixels)


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:18]}...{text[-9:]}"


def _cell(sample: Sample) -> Image.Image:
    try:
        cell, scale = _small(sample)
    except MemoryError:
        raise
    # On damaged files, decoders raise exceptions of any kind.
    except Exception:
        cell = Image.new("RGB", (_CELL, _CELL), "#cc3333")
        ImageDraw.Draw(cell).text((8, 8), "does not decode", "white")
        return cell
    draw = ImageDraw.Draw(cell)
    for box in sample.boxes or ():
        corners = [value * scale for value in box.corners]
        if corners[0] < corners[2] and corners[1] < corners[3]:
            draw.rectangle(corners, outline=_colour(box.name), width=1 if box.difficult else 2)
            draw.text((corners[0] + 3, corners[1] + 1), one_line(box.name), _colour(box.name))
    return cell


def _small(sample: Sample) -> tuple[Image.Image, float]:
    """The image at the size of a cell, and the factor by which its sides were scaled."""

    def fitted(upright: tuple[int, int]) -> tuple[tuple[int, int], float]:
        scale = _CELL / max(upright)
        return (max(1, round(upright[0] * scale)), max(1, round(upright[1] * scale))), scale

    file = io.BytesIO(sample.image)
    if sample.pixels is not None:
        whole = as_picture(decode_as(file, sample.pixels))
        size, scale = fitted(whole.size)
        return whole.resize(size, Image.Resampling.BICUBIC), scale
    picture = open_picture(file)
    size, scale = fitted(picture.upright)
    return picture.rgb(size, Image.Resampling.BICUBIC), scale


def _colour(name: str) -> str:
    """A colour that depends only on the class."""
    hue = zlib.crc32(name.encode("utf-8", "surrogatepass")) / 2**32
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 1.0))
    return f"#{red:02x}{green:02x}{blue:02x}"
