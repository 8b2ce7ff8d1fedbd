"""Labelled sets with everything that cameras and tools do to them: the object is under its box.

The oracles are Pillow's exif_transpose for the pixels and pycocotools for masks.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from tests.support.labelled_files import (
    Corners,
    Read,
    coco_json,
    from_shards,
    from_tree,
    red_area,
    save,
    scene,
    seen,
    stored,
    voc_xml,
    yolo_line,
)


@dataclass(frozen=True)
class Photograph:
    """width, height, box: of the upright picture. drawn: what the labels were drawn on."""

    width: int
    height: int
    box: Corners
    orientation: int | None
    xmp: bool
    suffix: str
    drawn: str
    stated: bool

    @property
    def decidable(self) -> bool:
        """Whether the stated size tells what the labels were drawn on."""
        sideways = self.orientation in (5, 6, 7, 8)
        return sideways and self.stated and self.width != self.height


@st.composite
def photographs(draw: st.DrawFn) -> Photograph:
    width, height = draw(st.integers(24, 60)), draw(st.integers(24, 60))
    x0, y0 = draw(st.integers(0, width // 2)), draw(st.integers(0, height // 2))
    x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
    return Photograph(
        width, height, (x0, y0, x1, y1),
        draw(st.sampled_from([None, *range(10)])), draw(st.booleans()),
        draw(st.sampled_from([".jpg", ".JPG", ".png", ".tif", ".webp"])),
        draw(st.sampled_from(["stored", "upright"])), draw(st.booleans()),
    )  # fmt: skip


def turned_box(photo: Photograph) -> Corners:
    """The box on the stored pixels."""
    inside = np.zeros((photo.height, photo.width), np.uint8)
    inside[photo.box[1] : photo.box[3], photo.box[0] : photo.box[2]] = 255
    rows, columns = np.nonzero(np.asarray(stored(Image.fromarray(inside), photo.orientation or 1)))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def written(root: Path, kind: str, photos: list[Photograph]) -> list[Path]:
    """A set of that kind; the files of its images."""
    folder = {"voc": "JPEGImages", "coco": "images", "yolo": "images/train"}[kind]
    files, boxes, sizes = [], list[Corners](), list[tuple[int, int] | None]()
    for number, photo in enumerate(photos):
        upright = scene(photo.width, photo.height, photo.box)
        pixels = stored(upright, photo.orientation or 1)
        file = root / folder / f"p{number}{photo.suffix}"
        save(file, pixels, photo.orientation, photo.xmp)
        files.append(file)
        on_upright = photo.drawn == "upright" or kind == "yolo"
        boxes.append(photo.box if on_upright else turned_box(photo))
        size = upright.size if on_upright else pixels.size
        sizes.append(size if photo.stated or kind == "yolo" else None)
    stems = [file.stem for file in files]
    if kind == "voc":
        (root / "Annotations").mkdir()
        (root / "ImageSets/Main").mkdir(parents=True)
        (root / "ImageSets/Main/train.txt").write_text("\n".join(stems))
        for stem, box, stated in zip(stems, boxes, sizes, strict=True):
            (root / f"Annotations/{stem}.xml").write_text(voc_xml(box, stated))
    elif kind == "coco":
        (root / "annotations").mkdir()
        content = coco_json([file.name for file in files], boxes, sizes)
        (root / "annotations/instances_train.json").write_text(json.dumps(content))
    else:
        (root / "labels/train").mkdir(parents=True)
        for stem, box, stated in zip(stems, boxes, sizes, strict=True):
            assert stated is not None
            (root / f"labels/train/{stem}.txt").write_text(yolo_line(box, stated))
        (root / "data.yaml").write_text("train: images/train\nnames: [red]\n")
    return files


@pytest.mark.slow
@settings(suppress_health_check=list(HealthCheck), max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["voc", "coco", "yolo"]),
    photos=st.lists(photographs(), min_size=1, max_size=3),
)
def test_the_object_is_under_its_box_from_tree_and_from_shards(
    tmp_path_factory: pytest.TempPathFactory, kind: str, photos: list[Photograph]
) -> None:
    tmp_path = tmp_path_factory.mktemp("set")
    files = written(tmp_path / "set", kind, photos)
    tree = from_tree(tmp_path / "set", masks=kind == "coco")
    shards = from_shards(tmp_path / "set", tmp_path / "out")
    assert len(tree.images) == len(shards.images) == len(photos)
    for read in (tree, shards):
        in_doubt = 0
        for number, (photo, file) in enumerate(zip(photos, files, strict=True)):
            upright = seen(file)
            turned = photo.orientation in range(2, 9)
            doubtful = kind != "yolo" and turned and not photo.decidable
            in_doubt += doubtful
            pixels = read.pixels(number)
            assert pixels.shape == upright.shape
            # The tree is decoded once, what is turned in shards was JPEG twice.
            assert np.abs(pixels.astype(int) - upright).mean() <= (0 if read is tree else 3)
            if not doubtful or photo.drawn == "stored":
                area = red_area(upright)
                assert np.abs(np.subtract(read.boxes[number], [area])).max() < 1e-3
                assert read.names[number] == ("red",)
        assert (f"orientation in doubt: {in_doubt} in all" in read.said) == bool(in_doubt)
    if kind == "coco":
        check_masks(tree, tmp_path / "set", photos)


def check_masks(read: Read, root: Path, photos: list[Photograph]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / "annotations/instances_train.json"))
    for number, photo in enumerate(photos):
        if not photo.stated:
            continue  # pycocotools draws no mask without a size
        mask = coco.annToMask(coco.anns[number + 1]) * 255
        doubtful = photo.orientation in range(2, 9) and not photo.decidable
        if photo.drawn == "stored" and photo.orientation in range(2, 9):
            file = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = photo.orientation
            Image.fromarray(mask).save(file, "PNG", exif=exif)
            mask = np.asarray(ImageOps.exif_transpose(Image.open(file)))
        elif doubtful:
            continue
        (drawn,) = read.images.masks(number)
        assert np.array_equal(drawn, mask > 0)
