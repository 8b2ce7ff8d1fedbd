"""Situations that people reported of tools like this one, each made again from nothing.

Whatever is read is right, or named and counted. A picture of 100 x 80 pixels shows a red rectangle
at BOX; how an export of it goes wrong is the name of the test.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import UsageError
from dupr_cli.pretrain.data import decode
from dupr_cli.probe.data import open_classified
from dupr_cli.progress import SilentReporter
from tests.support.labelled_files import (
    Corners,
    coco_json,
    counts,
    encoded,
    from_shards,
    from_tree,
    prepared,
    save,
    scene,
    skipped,
    stored,
    voc_xml,
    yolo_line,
)

SIZE = (100, 80)
BOX: Corners = (0, 0, 50, 40)
EDGES = [0.0, 0.0, 50.0, 40.0]
LINE = yolo_line(BOX, SIZE)


def picture(path: Path, number: int = 0) -> None:
    """A picture; another number is another file."""
    image = scene(*SIZE, BOX)
    image.paste((20 * number,) * 3, (90, 70, 100, 80))
    save(path, image, None)


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        picture(folder / name, number)


def both(root: Path, out: Path, split: str = "train", *overrides: str) -> list[list[list[float]]]:
    """Boxes as `evaluate` reads a set and as it reads the shards of it, which must agree."""
    tree = from_tree(root, split)
    shards = from_shards(root, out, *overrides, split=split)
    assert shards.boxes == [pytest.approx(np.array(b), abs=1e-3) for b in tree.boxes]
    assert shards.names == tree.names
    return [np.round(boxes, 3).tolist() for boxes in shards.boxes]


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


# --- orientation -----------------------------------------------------------------------------


def phones(root: Path, orientation: int, size: tuple[int, int], box: Corners) -> Path:
    """One photograph of a VOC tree whose labels were drawn upright."""
    upright = scene(*size, box)
    save(root / "JPEGImages/a.jpg", stored(upright, orientation), orientation)
    write(root / "Annotations/a.xml", voc_xml(box, size))
    write(root / "ImageSets/Main/train.txt", "a\n")
    return root


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_upright_labels_of_a_phone_stay_where_they_are(tmp_path: Path, orientation: int) -> None:
    root = phones(tmp_path / "voc", orientation, (80, 160), (0, 0, 40, 80))
    assert both(root, tmp_path / "out") == [[[0, 0, 40, 80]]]


@pytest.mark.parametrize("orientation", [0, 9, 100])
def test_an_orientation_that_is_none_counts_as_upright(tmp_path: Path, orientation: int) -> None:
    root = phones(tmp_path / "voc", orientation, SIZE, BOX)
    assert both(root, tmp_path / "out") == [[EDGES]]


def test_damaged_exif_counts_as_upright(tmp_path: Path) -> None:
    root = phones(tmp_path / "voc", 1, SIZE, BOX)
    scene(*SIZE, BOX).save(root / "JPEGImages/a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert both(root, tmp_path / "out") == [[EDGES]]


def test_where_size_cannot_tell_the_count_is_said(tmp_path: Path) -> None:
    root = phones(tmp_path / "voc", 3, SIZE, BOX)
    assert "orientation in doubt: 1 in all; the first: a" in from_tree(root).said
    said = prepared(root, tmp_path / "out")
    assert "orientation in doubt: 1 in all; the first: a" in said
    (line,) = (tmp_path / "out/notes.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "a"


# --- YOLO ------------------------------------------------------------------------------------


def yolo(root: Path, data: dict[str, Any], line: str = LINE) -> Path:
    picture(root / "images/train/a.jpg")
    write(root / "labels/train/a.txt", line)
    write(root / "data.yaml", yaml.safe_dump({"train": "images/train", **data}))
    return root


@pytest.mark.parametrize(
    "given",
    ["../train/images", "train/images", "./train/images/", "/home/me/set/train/images",
     "C:\\Users\\me\\set\\train\\images", ["train/images"], "list.txt"],
)  # fmt: skip
def test_paths_of_data_yaml_lead_to_the_images(tmp_path: Path, given: object) -> None:
    root = tmp_path / "set"
    for folder, number in (("train", 0), ("valid", 1)):
        picture(root / folder / "images/a.rf.0a1.jpg", number)
        write(root / folder / "labels/a.rf.0a1.txt", LINE)
    write(root / "list.txt", "C:\\data\\set\\train\\images\\a.rf.0a1.jpg\r\n", "utf-8-sig")
    data = {"train": given, "val": "../valid/images", "nc": 1, "names": ["red"]}
    write(root / "data.yaml", yaml.safe_dump(data))
    assert both(root, tmp_path / "out") == [[EDGES]]
    assert both(root, tmp_path / "out2", "val") == [[EDGES]]


def test_a_test_split_that_was_not_exported_is_said(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"test": "../test/images", "names": ["red"]})
    said = prepared(root, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1}
    assert "the test split of data.yaml does not exist" in said


@pytest.mark.parametrize("shape", [[4, 2], [4, 3], [17, 3]])
def test_pose_labels_are_a_box_and_keypoints(tmp_path: Path, shape: list[int]) -> None:
    points = [(0.25, 0.25), (0.5, 0.5)] + [(0.0, 0.0)] * (shape[0] - 2)
    words = [v for x, y in points for v in ((x, y) if shape[1] == 2 else (x, y, 2 if x else 0))]
    line = f"{LINE} {' '.join(map(str, words))}"
    root = yolo(tmp_path / "set", {"names": {0: "cow"}, "kpt_shape": shape}, line)
    assert both(root, tmp_path / "out") == [[EDGES]]
    (box,) = open_shards(str(tmp_path / "out"))[0].boxes or ()
    assert box.details["keypoints"][:9] == pytest.approx([25, 20, 2, 50, 40, 2, 0, 0, 0])


@pytest.mark.parametrize(
    ("line", "edges"),
    [
        ("0 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5", [10, 8, 40, 40]),  # an oriented box, or a polygon
        ("0 0.1 0.1 0.4 0.1 0.4 0.5", [10, 8, 40, 40]),
        (f"{LINE} 0.93", EDGES),
        (LINE.replace("0 ", "0.0 ", 1), EDGES),
    ],
)
def test_labels_of_other_tasks_are_told_by_their_count(
    tmp_path: Path, line: str, edges: list[float]
) -> None:
    root = yolo(tmp_path / "set", {"names": ["red"]}, line)
    assert both(root, tmp_path / "out") == [[edges]]


def test_a_confidence_that_is_not_taken_is_said(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"names": ["red"]}, f"{LINE} 0.93")
    assert "confidence not taken: 1 in all" in from_tree(root).said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-1 0.5 0.5 0.1 0.1", "the class is -1"),
        ("0.5 0.5 0.5 0.1 0.1", "the class is 0.5"),
        ("7 0.5 0.5 0.1 0.1", "class 7 has no name"),
        ("0 50 40 20 20", "coordinates outside 0 to 1"),
        ("0 0.5 0.5 1.5 0.1", "coordinates outside 0 to 1"),
        ("0 0.5 0.5 -0.1 0.1", "coordinates outside 0 to 1"),
        ("0 nan 0.5 0.1 0.1", "not a finite number"),
        ("0 0.5 0.5", "2 numbers after the class"),
        ("0 0.1 0.1 0.2 0.2 0.6 0.6 1", "7 numbers after the class"),
        ("cat 0.5 0.5 0.1 0.1", "not a label of YOLO"),
    ],
)
def test_a_bad_line_costs_that_line_and_is_named(tmp_path: Path, line: str, reason: str) -> None:
    root = yolo(tmp_path / "set", {"names": ["red"]}, f"{line}\n{LINE}\n")
    assert both(root, tmp_path / "out") == [[EDGES]]
    said = from_tree(root).said
    assert "label left out: 1 in all" in said
    assert "a.txt, line 1" in said
    assert reason in said


@pytest.mark.parametrize(
    ("names", "label", "name"),
    [
        (["a", "b", "c"], 2, "c"),
        ({0: "a", 2: "c"}, 2, "c"),
        ({"0": "a", "2": "c"}, 2, "c"),
        ({1: "a", 2: "b"}, 2, "b"),
    ],
)
def test_a_class_is_named_by_its_number(
    tmp_path: Path, names: object, label: int, name: str
) -> None:
    root = yolo(tmp_path / "set", {"names": names}, yolo_line(BOX, SIZE, label))
    assert from_tree(root).names == [(name,)]


def test_names_with_gaps_are_said(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"names": {1: "a", 2: "b"}}, LINE)
    said = from_tree(root).said
    assert "no name for the classes 0; their labels are left out" in said
    assert "class 0 has no name" in said


@pytest.mark.parametrize("text", ["red\nblue\n\n\n", "\ufeffred\r\nblue\r\n", "red\n\nblue\n"])
def test_the_number_of_a_line_of_classes_txt_is_the_class(tmp_path: Path, text: str) -> None:
    root = tmp_path / "set"
    picture(root / "images/a.jpg")
    label = text.strip().splitlines().index("blue")
    write(root / "labels/a.txt", yolo_line(BOX, SIZE, label))
    write(root / "classes.txt", text)
    assert from_tree(root).names == [("blue",)]
    assert ("no name for the classes 1" in from_tree(root).said) == (label == 2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_of_yolo_are_read_in_their_encoding(tmp_path: Path, encoding: str) -> None:
    root = yolo(tmp_path / "set", {"names": None})
    write(root / "labels/train/a.txt", f"{LINE}\r\n", encoding)
    write(root / "classes.txt", "röd\r\n", encoding)
    assert from_tree(root).names == [("röd",)]


def test_a_split_that_is_another_keeps_everything(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"val": "images/train", "names": ["red"]})
    said = prepared(root, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1, "val": 1}
    assert "1 images of the split val are also in train" in said


# --- exports as tools write them -------------------------------------------------------------


def roboflow_coco(root: Path) -> None:
    for folder in ("train", "valid"):
        pictures(root / folder, "a.jpg", "b.jpg")
        content = coco_json(["a.jpg", "b.jpg"], [BOX, BOX], [SIZE, SIZE])
        write(root / folder / "_annotations.coco.json", json.dumps(content))


def roboflow_voc(root: Path) -> None:
    for folder in ("train", "valid"):
        pictures(root / folder, "a.jpg", "b.jpg")
        for name in "ab":
            write(root / folder / f"{name}.xml", voc_xml(BOX, SIZE))


def labelimg_voc(root: Path) -> None:
    pictures(root, "a.JPG", "b.bmp")
    for name in "ab":
        write(root / f"{name}.xml", voc_xml(BOX, SIZE))


def no_lists(root: Path) -> None:
    pictures(root / "JPEGImages", "a.jpg", "b.jpg")
    for name in "ab":
        write(root / f"Annotations/{name}.xml", voc_xml(BOX, SIZE))


def labelimg_yolo(root: Path) -> None:
    pictures(root, "a.jpg", "b.jpg")
    for name in "ab":
        write(root / f"{name}.txt", LINE)
    write(root / "classes.txt", "red\n")


def cvat_yolo(root: Path) -> None:
    pictures(root / "obj_train_data", "a.jpg", "b.jpg")
    for name in "ab":
        write(root / f"obj_train_data/{name}.txt", LINE)
    write(root / "obj.names", "red\n")
    write(root / "obj.data", "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n")
    write(root / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")


def label_studio(root: Path) -> None:
    pictures(root / "images", "a.jpg", "b.jpg")
    content = coco_json(["images\\a.jpg", "images\\b.jpg"], [BOX, BOX], [SIZE, SIZE])
    write(root / "result.json", json.dumps(content))


def fiftyone(root: Path) -> None:
    pictures(root / "data", "a.jpg", "b.jpg")
    write(root / "labels.json", json.dumps(coco_json(["a.jpg", "b.jpg"], [BOX, BOX], [SIZE, SIZE])))


EXPORTS = [roboflow_coco, roboflow_voc, labelimg_voc, no_lists, labelimg_yolo, cvat_yolo,
           label_studio, fiftyone]  # fmt: skip


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: str(export.__name__))
def test_exports_are_recognised(tmp_path: Path, export: Callable[[Path], None]) -> None:
    export(tmp_path / "set")
    assert both(tmp_path / "set", tmp_path / "out") == [[EDGES], [EDGES]]
    if export in (roboflow_coco, roboflow_voc):
        assert both(tmp_path / "set", tmp_path / "out2", "val") == [[EDGES], [EDGES]]


def test_labels_that_are_not_taken_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path / "set/deep/er", "a.jpg", "b.jpg", "c.jpg")
    for name in "ab":
        write(tmp_path / f"set/deep/er/{name}.xml", voc_xml(BOX, SIZE))
    said = prepared(tmp_path / "set", tmp_path / "out")
    assert "2 label files were not read; the first is deep/er/a.xml" in said
    assert "source.kind=" in said


def test_labels_in_an_archive_are_counted(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr("a.jpg", encoded(scene(*SIZE, BOX), "JPEG"))
        opened.writestr("a.xml", voc_xml(BOX, SIZE))
    said = prepared(tmp_path / "a.zip", tmp_path / "out")
    assert "1 label files were not read" in said


def test_images_that_are_not_labelled_yet_are_taken_without_labels(tmp_path: Path) -> None:
    labelimg_voc(tmp_path / "set")
    picture(tmp_path / "set/c.jpg", 3)
    said = prepared(tmp_path / "set", tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 3}
    assert "no annotation: 1 in all; the first: c" in said
    for root in (tmp_path / "set", tmp_path / "out"):
        read = from_tree(root)
        assert read.images.ids == ["a", "b"]
        assert "1 of 3 images were left out" in read.said


def test_two_images_of_one_annotation_are_no_two_objects(tmp_path: Path) -> None:
    root = tmp_path / "set"
    pictures(root, "a.jpg", "a.png")
    xml = voc_xml(BOX, SIZE).replace("<annotation>", "<annotation><filename>a.png</filename>")
    write(root / "a.xml", xml)
    prepared(root, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1}
    assert "the annotation is for a.png" in skipped(tmp_path / "out")["a.jpg"]


# --- archives beside images ------------------------------------------------------------------


@pytest.mark.parametrize("archive", ["devkit.tar.gz", "labels.zip", "backup.tar", "preview.zip"])
def test_an_archive_beside_class_folders_hides_no_image(tmp_path: Path, archive: str) -> None:
    root = tmp_path / "set"
    for number, split in enumerate(("train", "val")):
        for place, name in enumerate(("cat", "dog")):
            picture(root / split / name / f"{split}.jpg", 10 * number + place)
    data = encoded(scene(*SIZE, BOX), "JPEG") if archive == "preview.zip" else b"text"
    name = "preview.jpg" if archive == "preview.zip" else "a/readme.txt"
    if archive.endswith(".zip"):
        with zipfile.ZipFile(root / archive, "w") as opened:
            opened.writestr(name, data)
    else:
        with tarfile.open(root / archive, "w:gz" if archive.endswith("gz") else "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    said = prepared(root, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 2, "val": 2}
    assert f"1 archives beside the images were not read; the first is {archive}" in said
    assert open_classified(str(root), "train", 1, SilentReporter()).labels == ("cat", "dog")


def test_images_outside_of_class_folders_are_counted(tmp_path: Path) -> None:
    for number, name in enumerate(("train/cat/a.jpg", "val/cat/a.jpg", "extra/dog/a.jpg")):
        picture(tmp_path / "set" / name, number)
    said = prepared(tmp_path / "set", tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1, "val": 1}
    assert "1 images outside the class folders" in said
    assert "extra/dog/a.jpg" in said


# --- lists and other texts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("bom.txt", "a.jpg\nb.jpg", "utf-8-sig"),
        ("wide.txt", "a.jpg\r\nb.jpg\r\n", "utf-16"),
        ("bom.csv", "path,label\r\na.jpg,1\r\nb.jpg,1\r\n", "utf-8-sig"),
        ("wide.csv", "path,label\r\na.jpg,1\r\nb.jpg,1\r\n", "utf-16"),
        ("semicolon.csv", "path;label\na.jpg;1\nb.jpg;1\n", "utf-8"),
        ("upper.csv", "Path,Label\na.jpg,1\nb.jpg,1\n", "utf-8"),
        ("headless.csv", "a.jpg,1\nb.jpg,1\n", "utf-8"),
        ("labelled.txt", "a.jpg 1\nb.jpg 0\n", "utf-8"),
        ("windows.txt", ".\\a.jpg\r\n.\\b.jpg\r\n", "utf-8"),
        ("comment.txt", "# my list\na.jpg\nb.jpg\n", "utf-8"),
    ],
)
def test_lists_are_read_as_programs_save_them(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / name, text, encoding)
    prepared(tmp_path / name, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 2}


# --- VOC -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (["IMG 1.jpg", "IMG 2.jpg"], ["IMG 1", "IMG 2"]),
        (["IMG.jpg", "IMG 2.jpg"], ["IMG", "IMG 2"]),
        (["a.jpg", "b.jpg"], ["a -1", "b  1"]),
        (["IMG 1.jpg", "IMG 2.jpg"], ['"IMG 1"', "'IMG 2'"]),
        (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
        (["a.Jpg", "b.JPEG"], ["a", "b"]),
        (["a.bmp", "b.webp"], ["a", "b"]),
        (["a.tif", "b.TIF"], ["a", "b"]),
        (["day/a.jpg", "night/a.jpg"], ["day/a", "night/a"]),
        (["a.v1.jpg", "a.v2.jpg"], ["a.v1", "a.v2"]),
        (["a.jpg", "b.jpg"], ["/x/JPEGImages/a.jpg", "C:\\x\\b.jpg"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_ids_of_voc_are_found_as_people_write_them(
    tmp_path: Path, files: list[str], lines: list[str], encoding: str
) -> None:
    root = tmp_path / "set"
    for number, file in enumerate(files):
        picture(root / "JPEGImages" / file, number)
        write(root / "Annotations" / f"{file.rpartition('.')[0]}.xml", voc_xml(BOX, SIZE))
    write(root / "ImageSets/Main/train.txt", "\r\n".join(lines), encoding)
    assert both(root, tmp_path / "out") == [[EDGES], [EDGES]]


@pytest.mark.parametrize(
    ("change", "boxes"),
    [
        (lambda xml: xml.replace("<width>100<", "<width>0<"), [EDGES]),
        (lambda xml: xml.replace("<width>100<", "<width>100.0<"), [EDGES]),
        (lambda xml: xml.replace("<xmin>1<", "<xmin>1.5<"), [[0.5, 0, 50, 40]]),
        (lambda xml: xml.replace("100", "200").replace("80", "160"), [[0, 0, 25, 20]]),
        (lambda xml: xml.replace("<xmax>50<", "<xmax>-20<"), []),
        (lambda xml: xml.replace("<name>red</name>", ""), []),
    ],
)
def test_fields_of_voc_are_taken_right_or_named(
    tmp_path: Path, change: Callable[[str], str], boxes: list[list[float]]
) -> None:
    root = phones(tmp_path / "set", 1, SIZE, BOX)
    write(root / "Annotations/a.xml", change(voc_xml(BOX, SIZE)))
    assert both(root, tmp_path / "out") == [boxes]
    if not boxes:
        assert "label left out: 1 in all" in from_tree(root).said


def test_labels_of_an_image_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    root = phones(tmp_path / "set", 1, SIZE, BOX)
    picture(root / "JPEGImages/b.jpg")
    write(root / "Annotations/b.xml", voc_xml(BOX, (500, 80)))
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    assert both(root, tmp_path / "out") == [[EDGES]]
    assert "labels are for an image of 500 x 80" in skipped(tmp_path / "out")["b"]
    said = from_tree(root).said
    assert "1 of 2 images were left out" in said
    assert "labels are for an image of 500 x 80 pixels, but the image has 100 x 80" in said


# --- COCO ------------------------------------------------------------------------------------


def coco(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    pictures(root / "images", "a.jpg", "b.jpg")
    content = coco_json(["a.jpg", "b.jpg"], [BOX, BOX], [SIZE, SIZE])
    change(content)
    write(root / "annotations/instances_train.json", json.dumps(content))
    return root


def each(rows: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for row in content[rows]:
            row[key] = value(row) if callable(value) else value

    return change


def all_strings(content: dict[str, Any]) -> None:
    for rows, keys in (
        ("images", ("id", "width", "height")), ("categories", ("id",)),
        ("annotations", ("image_id", "category_id")),
    ):  # fmt: skip
        for key in keys:
            each(rows, key, lambda row, key=key: str(row[key]))(content)


def twice_the_size(content: dict[str, Any]) -> None:
    each("images", "width", 200)(content)
    each("images", "height", 160)(content)
    each("annotations", "bbox", [0, 0, 100, 80])(content)


@pytest.mark.parametrize(
    "change",
    [
        each("annotations", "area", None),
        each("annotations", "segmentation", None),
        each("annotations", "segmentation", []),
        each("annotations", "segmentation", [0, 0, 50, 0, 50, 40]),
        each("annotations", "iscrowd", None),
        each("annotations", "iscrowd", "0"),
        each("annotations", "category_id", "1"),
        each("annotations", "category_id", 1.0),
        each("annotations", "image_id", lambda row: str(row["image_id"])),
        each("annotations", "bbox", ["0", "0", "50", "40"]),
        each("images", "file_name", lambda row: "images%2F" + row["file_name"]),
        each("images", "file_name", lambda row: "images\\" + row["file_name"]),
        each("images", "file_name", lambda row: "/data/upload/" + row["file_name"]),
        each("images", "width", None),
        all_strings,
        twice_the_size,
        lambda content: content["categories"].append({"id": 2, "name": "red"}),
        lambda content: content["annotations"].append(dict(content["annotations"][0], image_id=7)),
    ],
)
def test_odd_fields_of_coco_are_taken_right(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    root = coco(tmp_path / "set", change)
    assert both(root, tmp_path / "out") == [[EDGES], [EDGES]]
    tree = from_tree(root)
    assert not any(annotation.crowd.any() for annotation in tree.images.annotations)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["annotations"][1].update(bbox=[]), "annotation 2: its bbox is []"),
        (lambda c: c["annotations"][1].update(bbox=[50, 40, -50, -40]), "negative width"),
        (lambda c: c["annotations"][1].update(bbox=[0, 0, 5, 4, 0.9]), "four numbers are needed"),
        (lambda c: c["annotations"][1].update(category_id=9), "its category_id is 9"),
        (lambda c: c["annotations"][1].update(image_id=77), "1 rows belong to no image"),
    ],
)
def test_one_bad_row_of_coco_costs_that_row(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    root = coco(tmp_path / "set", change)
    assert both(root, tmp_path / "out") == [[EDGES], []]
    assert said in from_tree(root).said
    assert said in prepared(root, tmp_path / "again")


@pytest.mark.parametrize("size", [[160, 200], [80, 100]])
def test_a_mask_that_does_not_fit_costs_the_mask(tmp_path: Path, size: list[int]) -> None:
    mask = {"size": size, "counts": [0, 40, 7]}
    root = coco(tmp_path / "set", each("annotations", "segmentation", mask))
    assert both(root, tmp_path / "out") == [[EDGES], [EDGES]]
    assert "mask left out: 2 in all" in from_tree(root).said


# --- shards of others ------------------------------------------------------------------------


def foreign(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def photo(number: int, format_: str = "JPEG") -> bytes:
    image = scene(*SIZE, BOX)
    image.paste((20 * number,) * 3, (90, 70, 100, 80))
    return encoded(image, format_)


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        (["a.v1.jpg", "a.v1.cls", "a.v2.jpg", "a.v2.cls"], ["a.v1", "a.v2"]),
        (["day/a.jpg", "day/a.cls", "night/a.jpg", "night/a.cls"], ["day/a", "night/a"]),
        (["a.JPG", "a.cls", "b.Tiff", "b.cls", "c.bmp", "c.cls"], ["a", "b", "c"]),
        (["a.jpg", "a.mask.png", "a.cls"], ["a"]),
        (["a.left.jpg", "a.right.jpg", "b.jpg"], ["a.left", "a.right", "b"]),
    ],
)
def test_no_image_of_a_foreign_shard_is_hidden(
    tmp_path: Path, members: list[str], keys: list[str]
) -> None:
    formats = {"tiff": "TIFF", "bmp": "BMP", "png": "PNG"}
    content = {
        name: b"3" if name.endswith("cls")
        else photo(number, formats.get(name.rpartition(".")[2].lower(), "JPEG"))
        for number, name in enumerate(members)
    }  # fmt: skip
    tar = foreign(tmp_path / "in/x.tar", content)
    shards = open_shards(str(tar))
    assert list(shards.keys()) == keys
    classes = [shards.whole(number).extras.get("cls") for number in range(len(keys))]
    assert [c for c in classes if c] == [b"3"] * sum(name.endswith("cls") for name in members)
    prepared(tar, tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": len(keys)}


@pytest.mark.parametrize("value", [[1, 2], "text", 5, None, {"class": 3, "source": {"a": 1}}])
def test_json_of_any_form_in_a_foreign_shard_is_no_crash(tmp_path: Path, value: object) -> None:
    data = json.dumps(value).encode()
    tar = foreign(tmp_path / "in/x.tar", {"a.jpg": photo(0), "a.json": data, "a.boxes.json": data})
    prepared(tar, tmp_path / "out")
    (sample,) = [open_shards(str(tmp_path / "out"))[0]]
    kept = sample.info.get("class") if isinstance(value, dict) else sample.info.get("json")
    assert kept == (3 if isinstance(value, dict) else value)


# --- pixel depth -----------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 100 * 80).reshape(80, 100)


def deep(path: Path, values: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.tif", RAMP.astype(np.float32)),
        ("a.tif", (RAMP * 255).astype(np.float32)),
        ("a.tif", (RAMP * 65535).astype(np.uint16)),
        ("a.png", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 255).astype(np.int32)),
    ],
)
def test_a_depth_that_is_known_is_scaled(
    tmp_path: Path, name: str, values: np.ndarray[Any, Any]
) -> None:
    path = deep(tmp_path / "in" / name, values)
    prepared(tmp_path / "in", tmp_path / "out")
    shards = open_shards(str(tmp_path / "out"))
    grey = np.asarray(decode(shards[0]))[..., 0]
    assert np.abs(grey - 255 * RAMP).max() <= 1.5
    # A shard of others with the same file is the same picture.
    tar = foreign(tmp_path / "x.tar", {path.name: path.read_bytes()})
    assert np.array_equal(np.asarray(decode(open_shards(str(tar))[0]))[..., 0], grey)


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 40000).astype(np.float32),
        (RAMP * 4095).astype(np.uint16),
        (RAMP * 1e9).astype(np.int32),
        (RAMP - 0.5).astype(np.float32),
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
    ],
)
def test_a_depth_that_is_not_known_is_named(tmp_path: Path, values: np.ndarray[Any, Any]) -> None:
    deep(tmp_path / "in/deep.tif", values)
    picture(tmp_path / "in/plain.jpg")
    prepared(tmp_path / "in", tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1}
    reason = skipped(tmp_path / "out")["deep.tif"]
    assert reason.startswith("black and white are not known: ")
    assert "image.range" in reason


def test_the_recipe_says_what_is_white(tmp_path: Path) -> None:
    deep(tmp_path / "in/deep.png", (RAMP * 4095).astype(np.uint16))
    prepared(tmp_path / "in", tmp_path / "out", "image.range=[0, 4095]")
    grey = np.asarray(decode(open_shards(str(tmp_path / "out"))[0]))[..., 0]
    assert np.abs(grey - 255 * RAMP).max() <= 1.5


def test_a_range_that_leaves_two_greys_is_named(tmp_path: Path) -> None:
    deep(tmp_path / "in/deep.tif", RAMP.astype(np.float32))
    picture(tmp_path / "in/plain.jpg")
    prepared(tmp_path / "in", tmp_path / "out", "image.range=[0, 4095]")
    assert "black and white do not fit" in skipped(tmp_path / "out")["deep.tif"]


def deep_colour_png(values: np.ndarray[Any, Any]) -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads and does not write. values: (H, W, 3)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def test_colours_of_12_bits_in_16_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in/plain.jpg")
    for white in (4095, 65535):
        rows = np.repeat((RAMP * white).astype(">u2")[..., None], 3, axis=2)
        (tmp_path / f"in/{white}.png").write_bytes(deep_colour_png(rows))
    prepared(tmp_path / "in", tmp_path / "out")
    assert list(skipped(tmp_path / "out")) == ["4095.png"]


def test_a_deep_image_of_a_labelled_set_is_left_out_and_named(tmp_path: Path) -> None:
    root = phones(tmp_path / "set", 1, SIZE, BOX)
    deep(root / "JPEGImages/b.png", (RAMP * 4095).astype(np.uint16))
    write(root / "Annotations/b.xml", voc_xml(BOX, SIZE))
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    read = from_tree(root)
    assert read.images.ids == ["a"]
    assert "b.png: the image cannot be decoded (black and white are not known" in read.said


# --- whole sets ------------------------------------------------------------------------------


def test_what_is_no_labelled_set_is_said(tmp_path: Path) -> None:
    pictures(tmp_path / "set", "a.jpg")
    with pytest.raises(UsageError, match="not a labelled set"):
        from_tree(tmp_path / "set")


def test_labels_that_are_no_text_cost_that_image(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"names": ["red"]})
    (root / "labels/train/a.txt").write_bytes(b"\xff\xff\x00")
    with pytest.raises(UsageError, match=r"a\.txt: the file is not UTF-8 text"):
        from_tree(root)
