"""`dupr evaluate coco|yolo|cityscapes` from command to results, with every kind of detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import dupr
from tests.support.labelled_scenes import KitObject, cityscapes_instances, make_coco, yolo_set

pytestmark = pytest.mark.slow

SMALL = [
    "detector.backbone=resnet18", "detector.roi_size=4", "detector.mask_roi_size=4",
    "detector.pyramid_channels=32", "detector.rpn_pre_nms=[50,50]", "detector.rpn_post_nms=[20,20]",
    "detector.rois_per_image=8", "data.train_sizes=[72]", "data.test_size=72", "data.max_size=128",
    "train.iterations=2", "train.milestones=[]", "train.warmup=1", "train.batch_size=2",
    "train.workers=0", "test.precise_bn_batches=1", "test.score_threshold=0.0",
]  # fmt: skip
PYRAMID = ["detector.anchor_sizes=[8,16,32,64,128]"]


def scene(number: int) -> list[KitObject]:
    names = ("red", "green", "blue")
    return [
        (names[(number + half) % 3], 48 * half + 5, 10, 48 * half + 40, 50) for half in range(2)
    ]


def settings(*more: str) -> list[str]:
    return [part for key in (*SMALL, *more) for part in ("--set", key)]


def results(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("coco-tiny", ["detector.model=mask-rcnn-c4"]),
        ("coco-maskrcnn-r50fpn-12k", PYRAMID),
        ("coco-retinanet-r50fpn-12k", [*PYRAMID, "detector.anchor_octaves=1"]),
    ],
)
def test_coco(tmp_path: Path, recipe: str, more: list[str]) -> None:
    splits = {"train2017": [scene(n) for n in range(4)], "val2017": [scene(n) for n in range(2)]}
    tree, out = make_coco(tmp_path / "coco", splits), tmp_path / "out"
    printed = dupr(
        "evaluate", "coco", "none", "-r", recipe, "--data", tree, "--out", out, *settings(*more)
    ).stdout
    found = results(out)
    (entry,) = found["results"]
    masks = "retinanet" not in recipe
    assert ("segm_AP" in entry["metrics"]) == masks
    assert {"AP", "AP50", "AP75", "AR100"} <= entry["metrics"].keys()
    assert found["metric"].startswith("COCO box and mask AP" if masks else "COCO box AP")
    assert f"Changed: train.iterations is 2; {recipe} has" in " ".join(printed.split())
    assert (out / "01-none" / "analysis" / "errors.png").is_file()
    rows = out / "01-none" / "seed-0" / "detections.json"
    again = dupr(
        "evaluate", "detections", rows, "--data", tree, "--split", "val2017", "--metric", "coco",
        "--json",
    )  # fmt: skip
    scores = json.loads(again.stdout)["metrics"]
    assert scores["AP"] == pytest.approx(entry["metrics"]["AP"], abs=1e-9)
    assert json.loads(rows.read_text())


@pytest.mark.parametrize("more", [["--frozen"], []], ids=["frozen", "fine-tuned"])
def test_yolo(tmp_path: Path, more: list[str]) -> None:
    """Its figures are those of `evaluate detections` on data.yaml, and on shards made from it."""
    file, out = yolo_set(tmp_path / "set"), tmp_path / "out"
    small = settings() if not more else settings("train.warmup=0")
    dupr("evaluate", "yolo", "none", "--data", file, "--out", out, *more, *small)
    found = results(out)
    (entry,) = found["results"]
    assert found["test"]["images"] == 3
    assert found["metric"].startswith("COCO box AP")
    shards = tmp_path / "shards"
    dupr("prepare", file, shards)
    rows = out / "01-none" / "seed-0" / "detections.json"
    for data in (file, file.parent):
        again = dupr("evaluate", "detections", rows, "--data", data, "--split", "val",
                     "--metric", "coco", "--json")  # fmt: skip
        assert json.loads(again.stdout)["metrics"]["AP"] == pytest.approx(entry["metrics"]["AP"])

    # In shards the same images have other names: perfect detections under those names score 100.
    from dupr_cli.datasets.labelled import open_labelled
    from dupr_cli.progress import SilentReporter

    labelled = open_labelled(str(shards), ["val"], SilentReporter())
    perfect = [
        {"image_id": image_id, "name": name, "score": 1.0, "box": [float(v) for v in box]}
        for image_id, note in zip(labelled.ids, labelled.annotations, strict=True)
        for name, box in zip(note.names, note.boxes, strict=True)
    ]
    assert len(perfect) == 6
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    scored = dupr("evaluate", "detections", tmp_path / "perfect.json", "--data", shards, "--split",
                  "val", "--metric", "coco", "--json")  # fmt: skip
    assert json.loads(scored.stdout)["metrics"]["AP"] == pytest.approx(100)


def test_cityscapes(tmp_path: Path) -> None:
    root, out = cityscapes_instances(tmp_path / "cityscapes"), tmp_path / "out"
    dupr("evaluate", "cityscapes", "none", "--data", root, "--out", out, *settings())
    found = results(out)
    assert found["classes"] == ["car", "person"]
    assert found["test"]["objects"] == 3  # the group of people is one
    assert {"segm_AP", "cityscapes_AP"} <= found["results"][0]["metrics"].keys()


def test_masks_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    tree = make_coco(tmp_path / "coco", {"train": [scene(0)], "val": [scene(1)]})
    file = tree / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    done = dupr(
        "evaluate", "coco", "none", "--data", tree, "--out", tmp_path / "out",
        *settings("detector.model=mask-rcnn-c4"), code=2,
    )  # fmt: skip
    assert "an object has no mask" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_recipe_of_another_protocol_is_refused(tmp_path: Path) -> None:
    done = dupr(
        "evaluate", "voc", "none", "-r", "coco-tiny", "--data", tmp_path, "--out", tmp_path / "out",
        code=2,
    )  # fmt: skip
    assert "`dupr evaluate coco`" in done.stderr
