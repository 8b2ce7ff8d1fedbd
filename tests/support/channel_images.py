"""Images of one or several channels and 16 bits, generated, as files of the formats people have."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

LOW, HIGH = 100, 4095
KEPT = {1: ("--set", "image.channels=1", "--set", f"image.range=[{LOW}, {HIGH}]"),
        5: ("--set", "image.channels=5", "--set", f"image.range=[{LOW}, {HIGH}]")}  # fmt: skip

Values = NDArray[np.uint16]


def blobs(seed: int, channels: int, width: int = 48, height: int = 40) -> Values:
    """(H, W, C) of smooth blobs with 12 bits; the channels differ in shape and in brightness."""
    random = np.random.default_rng(seed)
    planes = []
    for channel in range(channels):
        coarse = random.uniform(0, HIGH / (1 + channel), (6, 6)).astype(np.float32)
        plane = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        planes.append(np.asarray(plane).clip(0, HIGH).astype(np.uint16))
    return np.stack(planes, axis=2)


def npy(values: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def grey_png(values: NDArray[np.generic]) -> bytes:
    """values: (H, W) or (H, W, 1)."""
    buffer = io.BytesIO()
    Image.fromarray(values.reshape(values.shape[:2])).save(buffer, "PNG")
    return buffer.getvalue()


def write_image(path: Path, values: Values) -> None:
    """A 16-bit PNG of one channel, or a TIFF with the channels of each pixel together."""
    if values.shape[2] == 1:
        path.with_suffix(".png").write_bytes(grey_png(values))
        return
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig"
    )


def write_folder(folder: Path, channels: int, count: int) -> list[Values]:
    """Image files named 000, 001, ...; returns their values."""
    folder.mkdir(parents=True)
    images = [blobs(number, channels) for number in range(count)]
    for number, values in enumerate(images):
        write_image(folder / f"{number:03d}", values)
    return images


def write_coco(root: Path, channels: int, counts: dict[str, int]) -> dict[str, list[Values]]:
    """COCO's layout: images of 96 x 72 with a bright and a dark rectangle; returns their values."""
    (root / "annotations").mkdir(parents=True)
    random, written = np.random.default_rng(7), dict[str, list[Values]]()
    for split, count in counts.items():
        (root / split).mkdir()
        rows: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        written[split] = []
        for number in range(1, count + 1):
            values = blobs(1000 + number, channels, 96, 72) // 2 + 500
            for half, brightness in enumerate((4000, 120)):
                x0, y0 = 48 * half + int(random.integers(1, 12)), int(random.integers(1, 24))
                width, height = (int(side) for side in random.integers(20, 34, 2))
                values[y0 : y0 + height, x0 : x0 + width] = brightness
                rows["annotations"].append(
                    {
                        "id": 10 * number + half, "image_id": number, "category_id": half + 1,
                        "bbox": [x0, y0, width, height], "area": width * height, "iscrowd": 0,
                    }
                )  # fmt: skip
            write_image(root / split / f"{number}", values)
            suffix = "png" if channels == 1 else "tif"
            rows["images"].append(
                {"id": number, "file_name": f"{number}.{suffix}", "width": 96, "height": 72}
            )
            written[split].append(values)
        content = {**rows, "categories": [{"id": 1, "name": "hot"}, {"id": 2, "name": "cold"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return written


def scaled(
    values: NDArray[np.generic], low: float = LOW, high: float = HIGH
) -> NDArray[np.float64]:
    """The definition of the scaling, independent of dupr's."""
    return np.minimum(1, np.maximum(0, (values.astype(np.float64) - low) / (high - low)))


def statistics(images: Sequence[Values]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, scaled."""
    pixels = np.concatenate([scaled(values).reshape(-1, values.shape[2]) for values in images])
    return pixels.mean(0).tolist(), pixels.std(0).tolist()
