"""What the commands of the documentation read, under the names that the pages use, at its smallest.

A name is made when a command needs it and no command of the page has written it.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.support.channel_images import blobs, grey_png, write_image
from tests.support.class_images import class_folders
from tests.support.command_line import dupr
from tests.support.images import encode, noise_image
from tests.support.keypoint_sets import yolo_faces
from tests.support.labelled_scenes import (
    KitObject,
    add_split,
    cityscapes_instances,
    make_coco,
    make_tree,
    yolo_set,
)
from tests.support.mask_sets import plain_folder, scenes, voc_year
from tests.support.recipes import SMALL_DETECTOR, SMALL_NETWORK, TINY
from tests.support.report_sources import write_study
from tests.support.weights import make_run

DETECTOR_SET = [word for key in SMALL_DETECTOR for word in ("--set", key)]
Maker = Callable[[Path], object]


def photographs(folder: Path, first: int = 0, count: int = 40) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        noise_image(number).save(folder / f"{number:02d}.png")


def _photo(file: Path) -> None:
    noise_image(99, 320, 240).save(file)


def _thermal(folder: Path) -> None:
    """16-bit counts between the range that the page gives."""
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(grey_png(blobs(number, 1) // 2 + 7200))


def _five_channels(folder: Path) -> None:
    folder.mkdir()
    for number in range(12):
        write_image(folder / f"{number}.tif", blobs(number, 5))


def _zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(50, 62):
            archive.writestr(f"{number}.png", encode(noise_image(number), "PNG"))


def _plain_shards(folder: Path) -> None:
    """WebDataset shards that dupr has not written."""
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as archive:
        for number in range(40):
            content = encode(noise_image(number))
            member = tarfile.TarInfo(f"{number:04d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _list(file: Path) -> None:
    photographs(file.parent / "listed", count=12)
    paths = sorted((file.parent / "listed").iterdir())
    if file.suffix == ".csv":
        file.write_text("\n".join(["path", *map(str, paths)]) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"path": [*map(str, paths)]}), file)


def _voc(root: Path) -> Path:
    """Every split of VOC, with boxes and with masks."""
    make_tree(root, 12, 6)
    train, val = (
        (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        for split in ("train", "val")
    )
    add_split(root, "trainval", train + val)
    add_split(root, "test", val)
    voc_year(root, scenes(train=8, val=4))
    voc_year(root, scenes(train_aug=8), augmented=True)
    return root


def _voc_years(root: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        _voc(root / year)


def _coco(root: Path) -> None:
    names = ("red", "green", "blue")

    def scene(number: int) -> list[KitObject]:
        return [
            (names[(number + half) % 3], 48 * half + 5, 10, 48 * half + 40, 50) for half in range(2)
        ]

    splits = {"train2017": [scene(n) for n in range(8)], "val2017": [scene(n) for n in range(4)]}
    make_coco(root, splits)
    for split in splits:  # every object with its 17 keypoints
        annotations = root / "annotations"
        content = json.loads((annotations / f"instances_{split}.json").read_text())
        for row in content["annotations"]:
            x, y, width, height = row["bbox"]
            row["num_keypoints"] = 17
            row["keypoints"] = [
                value for n in range(17) for value in (x + n * width / 17, y + height / 2, 2)
            ]
        (annotations / f"person_keypoints_{split}.json").write_text(json.dumps(content))


def _annotations(file: Path) -> None:
    _coco(file.parents[1] / "coco")
    shutil.copy(file.parents[1] / "coco" / "annotations" / file.name, file)


def _coco_results(file: Path) -> None:
    rows = [{"image_id": 1, "category_id": 10, "bbox": [5, 10, 35, 40], "score": 0.9}]
    file.write_text(json.dumps(rows))


def _poses(file: Path) -> None:
    yolo_faces(file.parent / "faces" / "data.yaml")
    content = (file.parent / "faces" / "data.yaml").read_text()
    file.write_text(content.replace("path: .", "path: faces"))


def _own_detections(file: Path) -> None:
    rows = [{"image_id": "img012", "name": "red", "score": 0.9, "box": [4, 4, 30, 30]}]
    file.write_text(json.dumps(rows))


def _voc_detections(file: Path) -> None:
    (file.parent / "comp4_det_test_red.txt").write_text("img012 0.9 5 5 30 30\n")


def _shards(folder: Path) -> None:
    photographs(folder.parent / f"of-{folder.name}")
    dupr("prepare", folder.parent / f"of-{folder.name}", folder)


def _labelled_shards(folder: Path) -> None:
    dupr("prepare", make_tree(folder.parent / f"of-{folder.name}", 12, 6), folder)


def _mine(file: Path) -> None:
    file.write_text("stage: pretrain\nextends: dupr-r18-cpu-smoke\n")


def _public_checkpoint(file: Path) -> None:
    """As MoCo writes it."""
    from dupr_cli.models.resnet import ResNetBackbone

    tensors = {
        f"module.encoder_q.{name}": tensor
        for name, tensor in ResNetBackbone("resnet50").state_dict().items()
    }
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": tensors}, file)


# The recipe and the seed of each run.
RUNS = {
    **dict.fromkeys(
        ("runs/dupr", "runs/a", "runs/mine", "runs/photos", "run", "RUN", "RUN_OF_DUPR"),
        ("dupr-r18-cpu-smoke", 0),
    ),
    **dict.fromkeys(("runs/moco", "runs/moco-v2", "RUN_OF_MOCO"), ("moco-v2-r18-cpu-smoke", 0)),
    "runs/b": ("dupr-r18-cpu-smoke", 1),
}


def smallest(recipe: str) -> list[str]:
    """The keys of TINY that a pre-training recipe takes, but for its length."""
    keys = [key for key in TINY if not key.startswith("train.steps")]
    return [key for key in keys if "moco" not in recipe or "patch" not in key]


class NamedInputs:
    """The inputs by name. cache: where trained runs are kept, of which every page gets a copy."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.makers: Mapping[str, Maker] = {
            **dict.fromkeys(("photos", "photographs", "IMAGES"), photographs),
            "test-photos": lambda folder: photographs(folder, first=36),
            **dict.fromkeys(("photo.jpg", "one.jpg", "two.jpg"), _photo),
            "thermal": _thermal,
            "scenes": _five_channels,
            **dict.fromkeys(("archive.zip", "more-test-photos.zip"), _zipped),
            "unlabelled_96px": _plain_shards,
            **dict.fromkeys(("list.csv", "list.parquet"), _list),
            **dict.fromkeys(
                ("VOC2012", "VOC_TREE", "dupr-demo/VOC2026", "voc_animals_160px"), _voc
            ),
            "VOCdevkit": _voc_years,
            **dict.fromkeys(("coco", "COCO", "COCO_FOLDER"), _coco),
            "annotations/instances_val2017.json": _annotations,
            "results.json": _coco_results,
            **dict.fromkeys(("data.yaml", "pose.yaml"), _poses),
            "set": lambda folder: yolo_set(folder, train=24),
            "study": write_study,
            "dupr-demo/run": lambda folder: make_run(folder, "resnet18"),
            "cityscapes": cityscapes_instances,
            "cells": lambda root: plain_folder(root, scenes(train=8, val=2, test=4)),
            **dict.fromkeys(("LABELLED", "IN1K"), class_folders),
            **dict.fromkeys(
                (
                    "shards",
                    "unlabelled",
                    "SHARDS",
                    "IN1K_SHARDS",
                    "SHARDS_OR_VOC",
                    "dupr-demo/shards",
                ),
                _shards,
            ),
            "animals": _labelled_shards,
            **dict.fromkeys(
                ("backbone.safetensors", "other.safetensors", "photos.safetensors"), self._backbone
            ),
            "moco_v2_200ep_pretrain.pth.tar": _public_checkpoint,
            "comp4_det_test_*.txt": _voc_detections,
            "eval/01-mine/seed-0/detections.json": _own_detections,
            **dict.fromkeys(("eval", "eval-voc"), self._results),
            "mine.yaml": _mine,
        }

    def make(self, name: str, folder: Path, network: str = "") -> None:
        """Make it in `folder`, if it is one of the names and not there.

        network: a run has a checkpoint of this one, with random weights, and nothing else.
        """
        parts = Path(name).parts
        for end in range(len(parts), 0, -1):
            known = "/".join(parts[:end])
            place = folder / known
            if known in RUNS and network:
                shutil.rmtree(place, ignore_errors=True)
                make_run(place, network)
            elif known in RUNS and not place.exists():
                shutil.copytree(self._run(*RUNS[known]), place, symlinks=True)
            elif known in self.makers and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                self.makers[known](place)
            elif not place.exists():
                continue
            return

    def _run(self, recipe: str, seed: int) -> Path:
        kept = self.cache / f"{recipe}-{seed}"
        if not kept.exists():
            self.make("shards", self.cache)
            keys = [word for key in (*smallest(recipe), SMALL_NETWORK) for word in ("--set", key)]
            dupr(
                "pretrain", recipe, "--data", self.cache / "shards", "--out", kept, *keys,
                "--steps", 4, "--seed", seed, "--device", "cpu",
            )  # fmt: skip
        return kept

    def _backbone(self, file: Path) -> None:
        run = self._run("dupr-r18-cpu-smoke", 1 if file.name == "other.safetensors" else 0)
        dupr("export", run, "--to", "safetensors", "--out", file)

    def _results(self, folder: Path) -> None:
        kept = self.cache / "results"
        if not kept.exists():
            self.make("VOC2012", self.cache)
            dupr(
                "evaluate", "voc", "none", "--frozen", "-r", "voc-frozen-tiny", "--data",
                self.cache / "VOC2012", "--out", kept, *DETECTOR_SET, "--device", "cpu",
            )  # fmt: skip
        shutil.copytree(kept, folder, symlinks=True)
