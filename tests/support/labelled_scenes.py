"""Labelled sets made on the spot: coloured rectangles on grey, as a VOC tree or as shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, shard_name, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from dupr_cli.datasets.voc import VocTree

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}

KitObject = tuple[str, int, int, int, int]  # class, xmin, ymin, xmax, ymax as VOC counts


def annotation_xml(objects: list[KitObject], difficult: bool = False) -> str:
    entries = "".join(
        f"<object><name>{escape(name)}</name><difficult>{int(difficult)}</difficult><bndbox>"
        f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation>{entries}</annotation>"


def draw(objects: list[KitObject], width: int, height: int) -> Image.Image:
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    for name, x0, y0, x1, y1 in objects:
        pixels[y0 - 1 : y1, x0 - 1 : x1] = COLOURS[name]
    return Image.fromarray(pixels)


def add_image(
    root: Path, image_id: str, objects: list[KitObject], size: tuple[int, int] = (96, 72)
) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    draw(objects, *size).save(root / "JPEGImages" / f"{image_id}.png")
    (root / "Annotations" / f"{image_id}.xml").write_text(annotation_xml(objects))


def make_coco(root: Path, splits: Mapping[str, Sequence[Sequence[KitObject]]]) -> Path:
    """COCO's layout, 2017 and all: images of 96 x 72 with rectangles, drawn as polygons."""
    (root / "annotations").mkdir(parents=True)
    for split, scenes in splits.items():
        (root / split).mkdir()
        content: dict[str, list[dict[str, object]]] = {
            "images": [],
            "annotations": [],
            "categories": [
                {"id": 10 * number, "name": name} for number, name in enumerate(COLOURS, 1)
            ],
        }
        for number, objects in enumerate(scenes, 1):
            file = f"{split}_{number}.png"
            draw(list(objects), 96, 72).save(root / split / file)
            size = {"width": 96, "height": 72}
            content["images"].append({"id": number, "file_name": file, **size})
            content["annotations"] += [
                {
                    "id": 100 * number + place,
                    "image_id": number,
                    "category_id": 10 * (list(COLOURS).index(name) + 1),
                    "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                    "area": (x1 - x0 + 1) * (y1 - y0 + 1),
                    "segmentation": [[x0 - 1, y0 - 1, x1, y0 - 1, x1, y1, x0 - 1, y1]],
                    "iscrowd": 0,
                }
                for place, (name, x0, y0, x1, y1) in enumerate(objects)
            ]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def add_split(root: Path, split: str, image_ids: list[str]) -> None:
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(image_ids) + "\n")


def make_tree(root: Path, train: int = 8, val: int = 4) -> Path:
    """A VOC tree of small images with one or two rectangles each; the same for every call."""
    random = np.random.default_rng(0)
    names = list(COLOURS)
    splits = {"train": range(train), "val": range(train, train + val)}
    for split, numbers in splits.items():
        for number in numbers:
            # Two objects side by side: the first lies in the left half, the second in the right.
            objects: list[KitObject] = []
            for half in range(1 + number % 2):
                x0, y0 = 48 * half + int(random.integers(1, 12)), int(random.integers(1, 24))
                width, height = (int(v) for v in random.integers(20, 36, 2))
                name = names[(number + half) % len(names)]
                objects.append((name, x0, y0, x0 + width - 1, y0 + height - 1))
            add_image(root, f"img{number:03d}", objects)
        add_split(root, split, [f"img{number:03d}" for number in numbers])
    return root


def shards_of(tree: Path, folder: Path) -> Path:
    """The same set as `dupr prepare` would write it: one shard per split, under a manifest."""
    folder.mkdir()
    voc = VocTree(tree)
    splits = {}
    for split in voc.splits:
        samples = [
            Sample(
                image_id,
                "png",
                voc.image_path(image_id).read_bytes(),
                boxes=tuple(voc.boxes(image_id)),
            )
            for image_id in voc.image_ids(split)
        ]
        name = shard_name(split, 0)
        index = write_shard(folder / name, samples)
        splits[split] = [ShardEntry(name, len(index), index.bytes, index.sha256)]
    Manifest(splits, list(COLOURS), 0, {}, str(tree), {}, "", "").write(folder)
    return folder


def voc_year(root: Path, objects: str = "", split: str = "a\nb\n") -> VocTree:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text(split)
    (root / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n")
    (root / "Annotations/a.xml").write_text(f"<annotation>{objects}</annotation>")
    return VocTree(root)


def yolo_set(root: Path, train: int = 4) -> Path:
    """data.yaml, images and labels in fractions of the image, as exporters write them."""
    for split, count in (("train", train), ("val", 3)):
        for number in range(count):
            image = np.full((72, 96, 3), 128, np.uint8)
            lines = []
            for half in range(2):
                x0, y0, x1, y1 = 48 * half + 5, 10 + number % 8, 48 * half + 40, 50
                image[y0:y1, x0:x1] = 0
                image[y0:y1, x0:x1, half] = 255
                box = ((x0 + x1) / 192, (y0 + y1) / 144, (x1 - x0) / 96, (y1 - y0) / 72)
                lines.append(" ".join(map(str, (half, *box))))
            for folder in ("images", "labels"):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
            (root / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    file = root / "data.yaml"
    file.write_text("train: images/train\nval: images/val\nnames: [red, green]\n")
    return file


def cityscapes_instances(root: Path) -> Path:
    """Three images to train on and one to test, each with a car, a person and a group of them."""
    drawn = np.full((72, 96), 7, dtype=np.uint16)
    drawn[10:50, 5:40], drawn[10:50, 53:88], drawn[60:, :20] = 26000, 24000, 24
    classes = np.where(drawn < 1000, drawn, drawn // 1000).astype(np.uint8)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            name = f"ulm_{split}_{number}"
            for part, suffix, image in (
                ("leftImg8bit", "leftImg8bit", Image.new("RGB", (96, 72))),
                ("gtFine", "gtFine_instanceIds", Image.fromarray(drawn)),
                ("gtFine", "gtFine_labelIds", Image.fromarray(classes)),
            ):
                folder = root / part / split / "ulm"
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{name}_{suffix}.png")
    return root
