"""`dupr evaluate detections`: stated figures, pycocotools' own, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dupr_cli.datasets.voc import VocTree
from tests.support.coco_case import draw_coco_case
from tests.support.command_line import dupr
from tests.support.known_case import DETECTIONS, STATED_VOC07, STATED_VOC10, TRUTHS
from tests.support.labelled_scenes import (
    COLOURS,
    KitObject,
    add_image,
    add_split,
    annotation_xml,
    make_coco,
    make_tree,
)

STATISTICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip


def scored(*arguments: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        dupr("evaluate", "detections", *arguments, "--json").stdout
    )
    return content


def known_case(root: Path) -> Path:
    """The known case as a VOC tree without any image, and its detections as comp4 files."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, boxes in TRUTHS.items():
        objects: list[KitObject] = [("object", x, y, x + w, y + h) for x, y, w, h in boxes]
        (root / "Annotations" / f"{name}.xml").write_text(annotation_xml(objects))
    lines = [
        f"{name} {score} {x} {y} {x + w} {y + h}"
        for name, found in DETECTIONS.items()
        for score, x, y, w, h in found
    ]
    add_split(root, "test", list(TRUTHS))
    (root / "comp4_det_test_object.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(("metric", "stated"), [("voc07", STATED_VOC07), ("voc10", STATED_VOC10)])
def test_stated_figures_of_a_known_case(
    tmp_path: Path, metric: str, stated: dict[float, float]
) -> None:
    tree = known_case(tmp_path)
    content = scored(
        tree / "comp4_det_test_object.txt", "--data", tree, "--split", "test", "--metric", metric,
        "--iou", 0.1, "--iou", 0.3,
    )  # fmt: skip
    for iou, expected in stated.items():
        assert content["metrics"][f"AP{100 * iou:.0f}"] / 100 == pytest.approx(expected, abs=1e-6)
    assert metric.upper() in content["metric_name"]
    assert (content["images"], content["objects"], content["detections"]) == (7, 15, 24)


def coco_case(shared_data: Path) -> tuple[Path, Path]:
    case = shared_data / "metric_cases" / "coco_val2014_100"
    return case / "instances_val2014_100.json", case / "instances_val2014_fakebbox100_results.json"


def pycocotools_stats(truth: Path, results: Path, kind: str = "bbox") -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats: list[float] = evaluation.stats.tolist()
    return stats


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_a_drawn_case_are_pycocotools_own_to_the_last_bit(
    tmp_path: Path, seed: int
) -> None:
    truth, results = draw_coco_case(tmp_path, seed=seed)
    content = scored(results, "--data", truth, "--metric", "coco")
    expected = [100 * value for value in pycocotools_stats(truth, results)]
    assert [content["metrics"][name] for name in STATISTICS] == expected


def test_figures_of_cocos_own_images_are_pycocotools_own_to_the_last_bit(shared_data: Path) -> None:
    truth, results = coco_case(shared_data)
    content = scored(results, "--data", truth, "--metric", "coco")
    expected = [100 * value for value in pycocotools_stats(truth, results)]
    assert [content["metrics"][name] for name in STATISTICS] == expected
    stated = [
        0.5045806987, 0.6969727247, 0.5729816670, 0.5856257209, 0.5193996948, 0.5013978986,
        0.3868127796, 0.5936795763, 0.5953529829,
    ]  # fmt: skip
    assert [content["metrics"][name] / 100 for name in STATISTICS[:9]] == pytest.approx(
        stated, abs=1e-6
    )


def test_masks_are_scored_where_all_results_have_them(tmp_path: Path) -> None:
    objects: list[KitObject] = [("red", 11, 21, 30, 50), ("blue", 61, 1, 96, 40)]
    tree = make_coco(tmp_path, {"val2017": [objects]})
    truth = tree / "annotations" / "instances_val2017.json"
    coco = COCO(str(truth))
    rows = []
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToRLE(annotation)
        rows.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                "score": 0.5,
            }
        )
    (tmp_path / "results.json").write_text(json.dumps(rows))
    content = scored(tmp_path / "results.json", "--data", tree, "--split", "val2017", "--metric",
                     "coco")  # fmt: skip
    assert content["metric"] == "coco-segm"
    assert content["metrics"]["segm_AP"] == content["metrics"]["AP"] == pytest.approx(100)


def kit_files(tree: Path, split: str = "val") -> list[Path]:
    """The ground truth as a detector's output, in the kit's files."""
    voc, lines = VocTree(tree), {name: list[str]() for name in COLOURS}
    for image_id in voc.image_ids(split):
        for box in voc.boxes(image_id):
            corners = (box.x_min + 1, box.y_min + 1, box.x_max, box.y_max)
            lines[box.name].append(f"{image_id} 0.9 {' '.join(f'{v:g}' for v in corners)}")
    files = []
    for name, of_class in lines.items():
        files.append(tree / f"comp4_det_val_{name}.txt")
        files[-1].write_text("\n".join(of_class) + "\n")
    return files


@pytest.mark.parametrize("metric", ["voc07", "voc10", "coco"])
def test_ground_truth_scores_100_without_any_image(tmp_path: Path, metric: str) -> None:
    tree = make_tree(tmp_path)
    for image in (tree / "JPEGImages").iterdir():
        image.unlink()
    content = scored(*kit_files(tree), "--data", tree, "--metric", metric)
    assert [content["metrics"][name] for name in ("AP", "AP50", "AP75")] == pytest.approx([100] * 3)
    assert sorted(content["per_class"]) == sorted(COLOURS)


def test_text_files_against_coco_name_images_by_their_files(tmp_path: Path) -> None:
    objects: list[KitObject] = [("red", 11, 21, 30, 50)]
    tree = make_coco(tmp_path, {"val2017": [objects]})
    file = tmp_path / "det_red.txt"
    file.write_text("val2017_1 0.7 11 21 30 50\n")
    content = scored(file, "--data", tree, "--split", "val2017", "--metric", "voc10")
    # As for training: val is val2017 where no other file is of a val split, and it is the default.
    by_default = scored(file, "--data", tree, "--metric", "voc10")
    assert by_default == {**content, "split": "val"}
    assert content["metrics"]["AP"] == pytest.approx(100)


def test_years_of_a_devkit_are_scored_by_their_own_names(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        add_image(tmp_path / year, "000001", [("red", 1, 1, 20, 20)])
        add_split(tmp_path / year, "test", ["000001"])
    file = tmp_path / "comp4_det_test_red.txt"
    file.write_text("000001 0.7 1 1 20 20\n")
    content = scored(file, "--data", tmp_path, "--split", "2007/test")
    assert (content["images"], content["metrics"]["AP50"]) == (1, pytest.approx(100))


def test_table_names_metric_and_what_is_missing(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    red = next(file for file in kit_files(tree) if "red" in file.name)
    printed = dupr("evaluate", "detections", red, "--data", tree, "--out", tmp_path / "out").stdout
    assert "VOC07 11-point AP" in printed
    assert "no detections for blue, green" in " ".join(printed.split())
    assert (tmp_path / "out" / "table.txt").read_text().strip() == printed.strip()
    for name in ("results.json", "analysis.json", "precision_recall.png", "confusion.png"):
        assert (tmp_path / "out" / name).is_file()
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert analysis["points"] == "voc07"
    assert analysis["errors"]["missed"]["count"] > 0


def test_longest_class_of_the_file_name_counts(tmp_path: Path) -> None:
    """`light` and `traffic_light` are classes; so the file is of the second."""
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "a.xml").write_text(
        annotation_xml([("light", 1, 1, 9, 9), ("traffic_light", 30, 30, 60, 60)])
    )
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    add_split(tmp_path, "val", ["a"])
    file = tmp_path / "comp4_det_val_traffic_light.txt"
    file.write_text("a 0.5 30 30 60 60\n")
    content = scored(file, "--data", tmp_path)
    assert content["per_class"]["traffic_light"]["AP"] == pytest.approx(100)
    assert content["per_class"]["light"]["AP"] == 0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "img008 0.5 1 1 20",
            r"line 2: the line is 'img008 0\.5 1 1 20'; expected .image score xmin",
        ),
        ("img008 high 1 1 20 20", r"line 2: .*high"),
        ("img008 nan 1 1 20 20", r"line 2: .*nan"),
        ("img008 0.5 1 1 inf 20", r"line 2: .*inf"),
        ("img000 0.5 1 1 20 20", r"line 2: .* has no image 'img000'"),
    ],
)
def test_line_that_is_none_is_named(tmp_path: Path, line: str, problem: str) -> None:
    tree = make_tree(tmp_path)
    file = tree / "comp4_det_val_red.txt"
    file.write_text(f"img008 0.5 1 1 20 20\n{line}\n")
    refused(problem, file, "--data", tree)


def refused(problem: str, *arguments: object) -> None:
    import re

    said = " ".join(dupr("evaluate", "detections", *arguments, code=2).stderr.split())
    assert re.search(problem, said), said


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    red = tree / "comp4_det_val_red.txt"
    red.write_bytes("img008 0.5 1 1 20 20 Zürich".encode("latin-1"))
    refused(r"val_red\.txt: the file is not UTF-8", red, "--data", tree)
    red.write_text("img008 0.5 1 1 20 20\n")
    again = tree / "comp3_det_val_red.txt"
    again.write_text("")
    refused(r"comp3_det_val_red\.txt and .*comp4_det_val_red\.txt both hold class red", red, again,
            "--data", tree)  # fmt: skip
    other = tree / "comp4_det_val_lion.txt"
    other.write_text("")
    refused(r"lion\.txt: name the file .*classes of .* are blue, green, red", other, "--data", tree)
    refused(r"no split 'tset'", red, "--data", tree, "--split", "tset")
    refused(r"nowhere: this file or folder does not exist", red, "--data", tree / "nowhere")
    refused(
        r"neither a VOC tree, nor a YOLO set",
        red,
        "--data",
        tree / "JPEGImages",
    )


def test_nothing_detected_is_an_ap_of_0(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    empty = tree / "comp4_det_val_red.txt"
    empty.write_text("")
    assert scored(empty, "--data", tree)["metrics"]["AP"] == 0
    (tmp_path / "detections.json").write_text("[]")
    assert scored(tmp_path / "detections.json", "--data", tree)["metrics"]["AP"] == 0
    coco = make_coco(tmp_path / "coco", {"val": [[("red", 1, 1, 20, 20)]]})
    (tmp_path / "results.json").write_text("[]")
    content = scored(tmp_path / "results.json", "--data", coco, "--metric", "coco")
    assert content["metrics"]["AP"] == 0


ROW = {"image_id": 1, "category_id": 10, "bbox": [0, 0, 20, 20], "score": 0.5}


def rle(pixels: np.ndarray) -> dict[str, object]:
    encoded = coco_mask.encode(np.asfortranarray(pixels))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


MASK = rle(np.ones((72, 96), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{**ROW, "image_id": 7}], r"detection 1: its image_id is 7, which is not in"),
        ([ROW, {**ROW, "category_id": 7}], r"detection 2: its category_id is 7"),
        ([{**ROW, "bbox": [1, 2]}], r"detection 1: its bbox is \[1, 2\]"),
        ([{**ROW, "score": "high"}], r"detection 1: its score is 'high'"),
        ([{**ROW, "score": float("nan")}], r"detection 1: its score is nan"),
        ([{**ROW, "score": 10**400}], r"detection 1: its score is 1000"),
        ([{**ROW, "segmentation": 3}], r"detection 1: its segmentation"),
        ([{**ROW, "segmentation": [[0, 0, 9, 0, 9, 9]]}], r"detection 1: .* not a mask in COCO's"),
        (
            [{**ROW, "segmentation": {"size": [72, 96], "counts": [0, 6912]}}],
            r"detection 1: .* not a mask in COCO's result format",
        ),
        (
            [{**ROW, "segmentation": {"size": [36, 48], "counts": "0d0"}}],
            r"detection 1: its mask is for an image of \[36, 48\] .* the image is \[72, 96\]",
        ),
        (
            [ROW, {k: v for k, v in ROW.items() if k != "bbox"} | {"segmentation": MASK}],
            r"some detections have a bbox and some do not",
        ),
        ({"images": []}, r"expected a list of detections"),
    ],
)
def test_results_that_are_none_are_named(tmp_path: Path, content: object, problem: str) -> None:
    coco = make_coco(tmp_path, {"val": [[("red", 1, 1, 20, 20)]]})
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    refused(problem, file, "--data", coco, "--metric", "coco")


OWN_ROW = {"image_id": "img008", "name": "red", "score": 0.5, "box": [0, 0, 20, 20]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([OWN_ROW, {**OWN_ROW, "image_id": "img000"}], r"detection 2: its image_id is 'img000'"),
        ([{**OWN_ROW, "name": "lion"}], r"detection 1: its name is 'lion'"),
        ([{**OWN_ROW, "score": float("nan")}], r"detection 1: its score is nan"),
        ([{**OWN_ROW, "score": "0.5"}], r"detection 1: its score is '0.5'"),
        (
            [{**OWN_ROW, "box": [0, 0, float("inf"), 9]}],
            r"detection 1: its box is \[0, 0, inf, 9\]",
        ),
        # Together they have as many numbers as one box.
        ([{**OWN_ROW, "box": [0, 0]}, {**OWN_ROW, "box": [9, 9]}], r"detection 1: its box"),
    ],
)
def test_rows_of_an_evaluation_that_are_none_are_named(
    tmp_path: Path, content: object, problem: str
) -> None:
    tree = make_tree(tmp_path)
    (tmp_path / "detections.json").write_text(json.dumps(content))
    refused(problem, tmp_path / "detections.json", "--data", tree)


def coco_with(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A red and a green object, each in an image of its own, in a file that is changed."""
    make_coco(root, {"val": [[("red", 1, 1, 20, 20)], [("green", 31, 6, 60, 60)]]})
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def scored_rows(root: Path, truth: Path, *rows: object) -> dict[str, Any]:
    (root / "results.json").write_text(json.dumps(rows))
    return scored(root / "results.json", "--data", truth, "--metric", "coco")


def test_size_of_a_found_mask_is_its_own(tmp_path: Path) -> None:
    """Not its box's: by that, the second one is no small mask, and pycocotools leaves it out."""
    truth = coco_with(tmp_path, lambda c: c)
    right, wrong = np.zeros((2, 72, 96), dtype=np.uint8)
    right[:20, :20] = 1
    wrong[60:70, 80:90] = 1
    rows = [
        {**ROW, "segmentation": rle(right)},
        {**ROW, "score": 0.9, "bbox": [50, 30, 40, 40], "segmentation": rle(wrong)},
    ]
    content = scored_rows(tmp_path, truth, *rows)
    assert content["metrics"]["APs"] == pytest.approx(100)
    assert content["metrics"]["segm_APs"] == pytest.approx(50)


@pytest.mark.parametrize("metric", ["voc07", "coco"])
def test_difficult_objects_are_neither_wrong_nor_missed(tmp_path: Path, metric: str) -> None:
    add_image(tmp_path, "a", [("red", 1, 1, 20, 20)])
    objects = "".join(
        annotation_xml([box], difficult) for box, difficult in (
            (("red", 1, 1, 20, 20), False), (("red", 51, 1, 70, 20), True),
        )
    ).replace("</annotation><annotation>", "")  # fmt: skip
    (tmp_path / "Annotations" / "a.xml").write_text(objects)
    add_split(tmp_path, "val", ["a"])
    file = tmp_path / "det_red.txt"
    for lines in ("a 0.9 51 1 70 20\na 0.8 1 1 20 20\n", "a 0.8 1 1 20 20\n"):
        file.write_text(lines)
        content = scored(file, "--data", tmp_path, "--metric", metric)
        assert content["metrics"]["AP"] == pytest.approx(100)
    assert content["objects"] == 1


@pytest.mark.parametrize("key", ["area", "iscrowd", "id"])
def test_annotations_may_lack_what_follows_from_the_others(tmp_path: Path, key: str) -> None:
    truth = coco_with(tmp_path, lambda c: [a.pop(key) for a in c["annotations"]])
    content = scored_rows(tmp_path, truth, ROW)
    assert content["per_class"]["red"]["AP"] == pytest.approx(100)
    assert content["metrics"]["APs"] == pytest.approx(100)  # 20 x 20 is small
    assert content["metrics"]["APm"] == 0  # the green one is not, and it is missed
    assert content["notes"][1:] == ["no detections for green, blue"]


@pytest.mark.parametrize("ids", [(0, 1), (5, 5)])
def test_objects_of_any_id_can_be_found(tmp_path: Path, ids: tuple[int, int]) -> None:
    """pycocotools by itself takes a match with the id 0 for none."""

    def number(content: dict[str, Any]) -> None:
        for annotation, of_annotation in zip(content["annotations"], ids, strict=True):
            annotation["id"] = of_annotation

    truth = coco_with(tmp_path, number)
    content = scored_rows(
        tmp_path, truth, ROW, {**ROW, "image_id": 2, "category_id": 20, "bbox": [30, 5, 30, 55]}
    )
    assert content["metrics"]["AP"] == pytest.approx(100)
    assert "renumbered" in content["notes"][-1]


def test_file_without_annotations_has_nothing_to_find(tmp_path: Path) -> None:
    truth = coco_with(tmp_path, lambda c: c.pop("annotations"))
    (tmp_path / "results.json").write_text(json.dumps([ROW]))
    refused(r"no class has an object to find", tmp_path / "results.json", "--data", truth,
            "--metric", "coco")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rows", "note"),
    [
        (lambda c: c, [{**ROW, "segmentation": MASK}, ROW], "detection 2 has no mask"),
        (
            lambda c: c["annotations"][1].pop("segmentation"),
            [{**ROW, "segmentation": MASK}],
            r"annotation 200 has no mask",
        ),
        (
            lambda c: [image.pop("height") for image in c["images"]],
            [{**ROW, "segmentation": MASK}],
            "the images have no height and width",
        ),
    ],
)
def test_boxes_are_scored_and_it_is_said_where_masks_are_missing(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], rows: list[object], note: str
) -> None:
    content = scored_rows(tmp_path, coco_with(tmp_path, change), *rows)
    assert content["metric"] == "coco"
    assert content["per_class"]["red"]["AP"] == pytest.approx(100)
    assert f"masks are not scored: {note}" in content["notes"]


def test_rows_may_say_more(tmp_path: Path) -> None:
    """pycocotools by itself takes rows with a caption for results of captioning."""
    truth = coco_with(tmp_path, lambda c: c)
    content = scored_rows(tmp_path, truth, {**ROW, "caption": "red", "keypoints": [1, 2, 2]})
    assert content["per_class"]["red"]["AP"] == pytest.approx(100)


def test_equal_scores_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """Which is not that of the images."""
    for image_id in ("a", "b"):
        add_image(tmp_path, image_id, [("red", 1, 1, 20, 20)] if image_id == "b" else [])
    add_split(tmp_path, "val", ["a", "b"])
    file = tmp_path / "det_red.txt"
    for lines, expected in (("ba", 100), ("ab", 50)):
        file.write_text("".join(f"{image_id} 0.5 1 1 20 20\n" for image_id in lines))
        content = scored(file, "--data", tmp_path, "--metric", "voc10")
        assert content["metrics"]["AP50"] == pytest.approx(expected)


def test_boxes_without_area_are_wrong_and_pointed_out(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    file = tree / "comp4_det_val_red.txt"
    file.write_text("img008 0.9 20 20 1 1\n")
    content = scored(file, "--data", tree)
    assert content["metrics"]["AP"] == 0
    assert "1 detections have a box without area" in content["notes"][-1]


def test_results_against_a_tree_are_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([ROW]))
    refused(
        r"ids in COCO's JSON; give that JSON as --data", tmp_path / "results.json", "--data", tree
    )


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_detections_of_an_evaluation_are_scored_again(tmp_path: Path, kind: str) -> None:
    """Another metric for a trial that is finished."""
    from dupr_cli.datasets.labelled import open_labelled
    from dupr_cli.evaluate.results_table import detection_rows
    from dupr_cli.metrics import Detections
    from dupr_cli.progress import SilentReporter

    tree = make_tree(tmp_path) if kind == "voc" else make_coco(
        tmp_path, {"val": [[("red", 1, 1, 20, 20)], [("green", 30, 5, 60, 60)]]}
    )  # fmt: skip
    images = open_labelled(str(tree), ["val"], SilentReporter())
    found = []
    for position in range(len(images)):
        truth = images.truth(position, images.classes)
        found.append(Detections(truth.boxes, truth.labels, np.ones(len(truth.labels))))
    file = tmp_path / "detections.json"
    file.write_text(detection_rows(found, images.ids, images.classes))
    assert scored(file, "--data", tree, "--metric", "coco")["metrics"]["AP"] == pytest.approx(100)


def test_pictures_are_pictures(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    dupr("evaluate", "detections", *kit_files(tree), "--data", tree, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "confusion.png") as image:
        assert image.format == "PNG"


def evaluated(root: Path, tested: int) -> tuple[Path, Path]:
    """A tree of four test images, and perfect detections of an evaluation of the first of them."""
    from dupr_cli.artifacts.results import Results
    from dupr_cli.datasets.labelled import open_labelled
    from dupr_cli.evaluate.results_table import detection_rows
    from dupr_cli.metrics import Detections
    from dupr_cli.progress import SilentReporter

    tree = make_tree(root / "tree")
    images = open_labelled(str(tree), ["val"], SilentReporter())
    few = images.subset(range(tested))
    truths = [few.truth(position, images.classes) for position in range(tested)]
    found = [Detections(t.boxes, t.labels, np.ones(len(t.labels))) for t in truths]
    trial = root / "eval" / "01-none" / "seed-0"
    trial.mkdir(parents=True)
    (trial / "detections.json").write_text(detection_rows(found, few.ids, images.classes))
    of = few.identity
    Results("p", "AP", of, of, images.classes, [], {}, "", [0], "0").write(root / "eval")
    return tree, trial / "detections.json"


def test_images_that_a_limited_evaluation_left_out_are_not_scored(tmp_path: Path) -> None:
    tree, file = evaluated(tmp_path, 2)
    content = scored(file, "--data", tree, "--metric", "voc10")
    assert (content["images"], content["metrics"]["AP"]) == (2, pytest.approx(100))
    assert "tested the first 2 of the 4 images only" in content["notes"][0]


def test_an_evaluation_of_all_images_is_scored_without_a_word(tmp_path: Path) -> None:
    tree, file = evaluated(tmp_path, 4)
    content = scored(file, "--data", tree, "--metric", "voc10")
    assert (content["images"], content["notes"]) == (4, [])


def test_other_images_than_the_evaluation_tested_are_refused(tmp_path: Path) -> None:
    tree, file = evaluated(tmp_path, 2)
    file.write_text("[]")
    add_split(tree, "other", ["img010", "img008", "img011"])
    refused("tested 2 images of .* which are not the first of the 3 in",
            file, "--data", tree, "--split", "other")  # fmt: skip


def test_images_without_any_detection_are_counted(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    file = tree / "comp4_det_val_red.txt"
    file.write_text("img008 0.9 1 1 20 20\n")
    assert "3 of the 4 images have no detection" in scored(file, "--data", tree)["notes"][0]


@pytest.mark.parametrize("kind", ["scored", "empty", "damaged"])
def test_report_of_a_folder_without_an_evaluation_says_what_is_expected(
    tmp_path: Path, kind: str
) -> None:
    tree, out = make_tree(tmp_path / "tree"), tmp_path / "out"
    out.mkdir()
    if kind == "scored":
        dupr("evaluate", "detections", *kit_files(tree), "--data", tree, "--out", out)
    if kind == "damaged":
        (out / "results.json").write_text('{"format_version": 2, "train')
    said = dupr("evaluate", "report", out, code=2).stderr
    assert f"{out / 'results.json'}: " in said
    assert "`dupr evaluate voc|coco|yolo|cityscapes|" in said
    assert "Error" not in said
    if kind == "scored":
        assert "not a results file of an evaluation, as protocol, train, test, classes," in said
