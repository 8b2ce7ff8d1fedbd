"""Small pictures, and shards of them, all generated; and where real data may lie."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def noise_image(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random picture: blobs rather than pixel noise, so that views resemble each other."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def write_shards(folder: Path, samples: int, per_shard: int = 20) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, samples, per_shard)):
        shard = [
            Sample(f"s{i:04d}", "jpg", encode(noise_image(i)), f"s{i:04d}.jpg", 48, 40)
            for i in range(first, min(samples, first + per_shard))
        ]
        name = f"train-{number:06d}.tar"
        index = write_shard(folder / name, shard)
        entries.append(ShardEntry(name, len(index), index.bytes, index.sha256))
    Manifest({"train": entries}, [], 0, {}, "test", {}, "test", "0").write(folder)
    return folder


def write_grainy_shards(folder: Path) -> Path:
    """80 images without flat areas: ties in max-pooling would make rounding jump."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(80):
        coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((80, 80), Image.Resampling.BICUBIC), dtype=np.float64)
        grain = random.normal(0, 25, smooth.shape)
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        samples.append(Sample(f"s{number:03d}", "png", encode(image, "PNG"), "", 80, 80))
    index = write_shard(folder / "train-000000.tar", samples)
    entry = ShardEntry("train-000000.tar", len(index), index.bytes, index.sha256)
    Manifest({"train": [entry]}, [], 0, {}, "test", {}, "test", "0").write(folder)
    return folder
