"""Files of labelled images as cameras and labelling tools write them, and both ways to read them.

A picture shows one red rectangle on grey; whoever reads it must find the rectangle under its box.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from dupr_cli import prepare
from dupr_cli.artifacts.shards import Manifest
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.reporters import Listening

RED = (220, 30, 30)
Corners = tuple[int, int, int, int]

# What was done to the upright picture to store it with an orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene(width: int, height: int, box: Corners) -> Image.Image:
    pixels = np.full((height, width, 3), 120, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = RED
    return Image.fromarray(pixels)


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    way = STORED.get(orientation)
    return upright if way is None else upright.transpose(way)


def save(path: Path, image: Image.Image, orientation: int | None, xmp: bool = False) -> None:
    """A file by its suffix, with an orientation in EXIF or in XMP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {
        "jpg": "JPEG",
        "jpeg": "JPEG",
        "tif": "TIFF",
        "webp": "WEBP",
        "png": "PNG",
        "bmp": "BMP",
    }
    format_ = kind[path.suffix.lower()[1:].replace("jpeg", "jpg")]
    lossy: dict[str, dict[str, object]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    options = dict(lossy.get(format_, {}))
    if orientation is not None and not xmp:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    elif orientation is not None:
        text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
        if format_ == "PNG":
            chunk = PngImagePlugin.PngInfo()
            chunk.add_itxt("XML:com.adobe.xmp", text)
            options["pnginfo"] = chunk
        elif format_ == "TIFF":
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[700] = text.encode()
            options["tiffinfo"] = tags
        else:
            options["xmp"] = text.encode()
    image.save(path, format_, **options)


def seen(path: Path) -> NDArray[np.uint8]:
    """The pixels of a file as Pillow shows them upright."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def red_area(pixels: NDArray[np.uint8]) -> list[float]:
    """The box around what is red."""
    values = pixels.astype(int)
    red = (values[..., 0] - values[..., 1]) > 100
    rows, columns = np.nonzero(red)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def voc_xml(box: Corners, size: tuple[int, int] | None, name: str = "red") -> str:
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return (
        f"<annotation>{stated}<object><name>{name}</name><bndbox><xmin>{box[0] + 1}</xmin>"
        f"<ymin>{box[1] + 1}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        f"</annotation>"
    )


def yolo_line(box: Corners, size: tuple[int, int], label: int = 0) -> str:
    width, height = size
    shares = (
        (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height,
        (box[2] - box[0]) / width, (box[3] - box[1]) / height,
    )  # fmt: skip
    return f"{label} " + " ".join(f"{share:.9f}" for share in shares)


def coco_json(
    names: Sequence[str], boxes: Sequence[Corners], sizes: Sequence[tuple[int, int] | None]
) -> dict[str, list[dict[str, object]]]:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, (name, box, size) in enumerate(zip(names, boxes, sizes, strict=True), 1):
        sides = {"width": size[0], "height": size[1]} if size else {}
        x0, y0, x1, y1 = box
        images.append({"id": number, "file_name": name, **sides})
        annotations.append(
            {
                "id": number, "image_id": number, "category_id": 1, "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
        )  # fmt: skip
    categories: list[dict[str, object]] = [{"id": 1, "name": "red"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@dataclass(frozen=True)
class Read:
    """A split of a set as it was read, and what was said meanwhile."""

    images: LabelledSet
    said: str

    @property
    def boxes(self) -> list[list[list[float]]]:
        return [annotation.boxes.tolist() for annotation in self.images.annotations]

    @property
    def names(self) -> list[tuple[str, ...]]:
        return [annotation.names for annotation in self.images.annotations]

    def pixels(self, number: int) -> NDArray[np.uint8]:
        return np.asarray(self.images.image(number))


def from_tree(address: Path, split: str = "train", masks: bool = False) -> Read:
    reporter = Listening()
    images = open_labelled(str(address), [split], reporter, masks=masks)
    return Read(images, "\n".join(reporter.warnings))


def from_shards(source: Path, out: Path, *overrides: str, split: str = "train") -> Read:
    """The set after `dupr prepare`."""
    said = prepared(source, out, *overrides)
    return Read(from_tree(out, split).images, said)


def prepared(source: Path, out: Path, *overrides: str) -> str:
    """What `dupr prepare` said."""
    reporter = Listening()
    recipe = load_recipe(PrepareRecipe, None, list(overrides))
    prepare.run(recipe, source, out, workers=1, reporter=reporter)
    return "\n".join(reporter.warnings)


def counts(out: Path) -> dict[str, int]:
    """Images in each split of a preparation."""
    splits = Manifest.read(out).splits
    return {name: sum(entry.samples for entry in entries) for name, entries in splits.items()}


def skipped(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()
