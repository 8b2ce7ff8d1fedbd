"""Pictures of classes that any network can tell apart, as class folders and as shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, shard_name, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from dupr_cli.recipe import ProbeRecipe
from tests.support.images import encode

HUES = {"amber": (230, 150, 30), "jade": (30, 170, 110), "plum": (140, 50, 130)}


def picture(name: str, seed: int) -> Image.Image:
    """A coloured rectangle of the class on noise, 56 x 48."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 166, (48, 56, 3), dtype=np.uint8)
    x, y = random.integers(2, 20, 2)
    width, height = random.integers(20, 28, 2)
    pixels[y : y + height, x : x + width] = HUES[name]
    return Image.fromarray(pixels)


def class_folders(root: Path, train: int = 12, val: int = 6) -> Path:
    """train/ and val/ with a folder per class and so many images in each."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for number, name in enumerate(HUES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(name, first + 100 * number + i).save(folder / f"{i:02d}.png")
    return root


def class_shards(folder: Path, train: int = 12, val: int = 6) -> Path:
    """The same images as `dupr prepare` would write them."""
    folder.mkdir()
    splits = {}
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        samples = [
            Sample(
                f"{split}_{name}_{i:02d}",
                "png",
                encode(picture(name, first + 100 * number + i), "PNG"),
                label=name,
            )
            for number, name in enumerate(HUES)
            for i in range(count)
        ]
        file = shard_name(split, 0)
        index = write_shard(folder / file, samples)
        splits[split] = [ShardEntry(file, len(index), index.bytes, index.sha256)]
    Manifest(splits, list(HUES), 0, {}, "", {}, "", "").write(folder)
    return folder


def probe_recipe(protocol: str, **sections: object) -> ProbeRecipe:
    """The smallest recipe: ResNet-18 on crops of 48 pixels, one level."""
    values: dict[str, object] = {
        "protocol": protocol,
        "backbone": "resnet18",
        "levels": ["res3"],
        "images": {"resize": 48, "crop": 48, "batch_size": 8, "workers": 0},
        "knn": {"neighbours": [3, 5], "shown": 5},
        "sgd": {"epochs": 2, "milestones": [1], "batch_size": 16},
        "logistic": {"penalties": [1e-3, 1e-1], "iterations": 30},
        "svm": {"costs": [0.1, 1.0], "folds": 2},
        "retrieval": {"views": {"size": 64}, "bins": 2, "object_side": 64, "neighbours": [1, 3]},
        "data": {"min_object": 8},
    }
    return ProbeRecipe.model_validate({**values, **sections})
