"""COCO's JSON against pycocotools, and damaged files, each named with the annotation."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from dupr_cli.datasets.coco import coco_split, image_folder, read_coco, with_keypoints
from dupr_cli.errors import UsageError
from tests.support.coco_case import draw_coco_case


def content() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.jpg"},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 5, "image_id": 7, "category_id": 18, "bbox": [1, 2, 10.5, 4], "area": 20,
                "iscrowd": 1, "segmentation": {"size": [30, 40], "counts": "0"},
            },
            {"id": 6, "image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 4]},
        ],
    }  # fmt: skip


def written(folder: Path, value: object) -> Path:
    file = folder / "instances_val2017.json"
    file.write_text(json.dumps(value))
    return file


def test_categories_are_in_order_of_ids_and_images_in_order_of_the_file(tmp_path: Path) -> None:
    coco = read_coco(written(tmp_path, content()))
    assert coco.classes == ["person", "dog"]
    assert [(image.id, image.file_name, image.width) for image in coco.images] == [
        (7, "b.jpg", 40),
        (3, "a.jpg", None),
    ]
    assert coco.images[1].objects == ()


def test_objects_keep_crowd_area_and_segmentation(tmp_path: Path) -> None:
    dog, person = read_coco(written(tmp_path, content())).images[0].objects
    assert (dog.name, dog.corners, dog.crowd) == ("dog", (1, 2, 11.5, 6), True)
    assert dog.details == {"id": 5, "area": 20, "segmentation": {"size": [30, 40], "counts": "0"}}
    assert person.corners == (0, 0, 0, 4)  # no area: kept, the caller decides


def as_pycocotools_reads_it(file: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file))
    coco = read_coco(file)
    assert coco.categories == {n: c["name"] for n, c in sorted(theirs.cats.items())}
    for image in coco.images:
        expected = theirs.imgToAnns[image.id]
        assert [box.details["id"] for box in image.objects] == [a["id"] for a in expected]
        for box, annotation in zip(image.objects, expected, strict=True):
            x, y, width, height = annotation["bbox"]
            assert box.corners == (x, y, x + width, y + height)
            assert box.crowd == bool(annotation["iscrowd"])


def test_a_drawn_set_is_as_pycocotools_reads_it(tmp_path: Path) -> None:
    as_pycocotools_reads_it(draw_coco_case(tmp_path)[0])


def test_cocos_own_images_are_as_pycocotools_reads_them(shared_data: Path) -> None:
    as_pycocotools_reads_it(
        shared_data / "metric_cases/coco_val2014_100/instances_val2014_100.json"
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("annotations", 0, "bbox"), [1, 2, 3], r"annotation 5: its bbox is \[1, 2, 3\]; four"),
        (("annotations", 0, "bbox"), [1, 2, "x", 4], "annotation 5: its bbox"),
        (("annotations", 0, "bbox"), [1, 2, float("nan"), 4], "annotation 5: its bbox"),
        (("annotations", 0, "bbox"), [9, 9, -3, 4], "annotation 5: .* negative width or height"),
        (("annotations", 0, "bbox"), None, "annotation 5: its bbox is None"),
        (("annotations", 0, "iscrowd"), "maybe", "annotation 5: its iscrowd is 'maybe'"),
        (("annotations", 1, "category_id"), 99, "annotation 6: its category_id is 99; .* 1, 18"),
        (("annotations", 1, "image_id"), 99, "annotation 6: its image_id is 99, but no image"),
        (("annotations", 1, "area"), "big", "annotation 6: its area is 'big'"),
        (("images", 1, "file_name"), None, "image number 2: an id and a file_name are needed"),
        (("categories", 1, "id"), 18, "category 18: another category has the same id"),
        (("categories", 1), {"name": "cat"}, "category number 2: an id and a name are needed"),
        (("annotations", 0), 5, "annotation number 1: an object is needed, not 5"),
    ],
)
def test_a_bad_row_costs_that_row_and_is_named(
    tmp_path: Path, place: tuple[str | int, ...], value: object, message: str
) -> None:
    damaged: Any = content()
    inner = damaged
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    coco = read_coco(written(tmp_path, damaged))
    assert any(re.search(message, reason) for reason in coco.all_left_out), coco.all_left_out
    taken = sum(len(image.objects) for image in coco.images)
    named = [reason for reason in coco.all_left_out if reason.startswith("annotation")]
    assert taken + len(named) == 2


def test_images_of_one_id_are_left_out_and_named(tmp_path: Path) -> None:
    damaged = content()
    damaged["images"] += [{"id": 3, "file_name": "c.jpg"}, dict(damaged["images"][0])]
    coco = read_coco(written(tmp_path, damaged))
    assert [image.id for image in coco.images] == [7]
    assert coco.left_out == ("image 3: another image has the same id; give each its own",)


@pytest.mark.parametrize(
    "mask",
    [[[1, 2, 3]], {"counts": "0"}, "abc", {"size": [3, 4], "counts": [0, 12]},
     {"size": [30, 40], "counts": [0, 7]}],
)  # fmt: skip
def test_a_bad_mask_costs_the_mask_and_is_named(tmp_path: Path, mask: object) -> None:
    damaged = content()
    damaged["annotations"][0]["segmentation"] = mask
    (image, _) = read_coco(written(tmp_path, damaged)).images
    assert len(image.objects) == 2
    assert "segmentation" not in image.objects[0].details
    (remark,) = image.remarks
    assert remark.startswith("mask left out: annotation 5: ")


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe\x00", b"[]", b'{"a": 1}'])
def test_a_file_that_is_no_coco_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "some.json").write_bytes(data)
    with pytest.raises(UsageError, match=r"some\.json"):
        read_coco(tmp_path / "some.json")


def test_keypoints_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path, content())
    beside = {
        "images": [],
        "annotations": [{"id": 6, "keypoints": [1, 2, 2], "num_keypoints": 1}],
    }
    (tmp_path / "person_keypoints_val2017.json").write_text(json.dumps(beside))
    dog, person = with_keypoints(read_coco(file)).images[0].objects
    assert person.details["keypoints"] == [1, 2, 2]
    assert "keypoints" not in dog.details


@pytest.mark.parametrize("place", ["val2017", "images/val2017", "images", ".", "annotations"])
def test_images_are_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    (tmp_path / "annotations").mkdir()
    coco = read_coco(written(tmp_path / "annotations", content()))
    assert image_folder(coco) is None
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "b.jpg").touch()
    found = image_folder(coco)
    assert found is not None
    assert found.resolve() == folder.resolve()


def test_the_split_is_in_the_name() -> None:
    assert coco_split(Path("annotations/instances_train2017.json")) == "train"
    assert coco_split(Path("person_keypoints_val2017.json")) == "val"
    assert coco_split(Path("mine.json")) == "mine"
