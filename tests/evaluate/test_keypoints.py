"""Keypoint R-CNN: its targets, its learning, and `dupr evaluate` from keypoints to results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detection_data import ImageLoading, ImageRequest, keypoint_flips
from dupr_cli.evaluate.detector_data import HeadOutput
from dupr_cli.evaluate.detectors import build_detector
from dupr_cli.evaluate.inference import in_source_pixels
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import EvaluateRecipe, load_recipe
from dupr_cli.runtime.parallel import World
from tests.support.command_line import dupr
from tests.support.keypoint_sets import FLIPS, coco_faces, yolo_faces

SIGMAS = [0.05, 0.1, 0.1]
SET = [
    "detector.backbone=resnet18", "detector.roi_size=4", "detector.keypoint_roi_size=4",
    "detector.keypoint_convolutions=1", "detector.pyramid_channels=32",
    "detector.rpn_pre_nms=[50,50]", "detector.rpn_post_nms=[20,20]", "detector.rois_per_image=8",
    "data.train_sizes=[72]", "data.test_size=72", "data.max_size=128", "train.iterations=2",
    "train.milestones=[]", "train.warmup=1", "train.batch_size=2", "train.workers=0",
    "test.precise_bn_batches=1", "test.score_threshold=0.0", "test.pictures=1",
]  # fmt: skip
GIVEN = [f"data.keypoint_flips={FLIPS}", f"test.keypoint_sigmas={SIGMAS}"]
CPU = World(torch.device("cpu"))


def recipe(*more: str) -> EvaluateRecipe:
    return load_recipe(EvaluateRecipe, "coco-keypoint-tiny", [*SET, *GIVEN, *more])


def opened(root: Path, split: str = "train") -> Any:
    return open_labelled(str(root), [split], SilentReporter(), keypoints=True)


def test_only_classes_with_keypoints_are_kept(tmp_path: Path) -> None:
    images = opened(coco_faces(tmp_path / "coco", {"train": 2}))
    assert images.classes == ["face"]
    assert images.keypoint_count == 3
    truth = images.truth(0, ["face"])
    assert truth.keypoints is not None
    assert truth.keypoints.tolist() == [[[23, 22, 2], [11, 12, 2], [34, 12, 2]]]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [40, 80, 120])
def test_each_keypoint_stays_on_its_dot(flip: bool, side: int, tmp_path: Path) -> None:
    """Resized and mirrored: the left dot of the mirrored face is green no longer, but blue."""
    images = opened(coco_faces(tmp_path / "coco", {"train": 3}))
    read = ImageLoading(images, recipe().data, ["face"], masks=False)
    for position in range(3):
        batch = read(ImageRequest(position, side, flip))
        (pixels,), (target,) = batch.images, batch.targets
        assert target.keypoints is not None
        colours = [
            pixels[:, int(y), int(x)].argmax().item() for x, y, _ in target.keypoints[0].tolist()
        ]
        # Left and right are those of the face: the mirrored face has its left on the other side.
        assert colours == ([0, 2, 1] if flip else [0, 1, 2])
        left, right = target.keypoints[0, 1, 0], target.keypoints[0, 2, 0]
        assert left < right


def test_detected_keypoints_return_to_the_pixels_of_the_image(tmp_path: Path) -> None:
    images = opened(coco_faces(tmp_path / "coco", {"train": 1}))
    read = ImageLoading(images, recipe().data, ["face"], masks=False)
    batch = read(ImageRequest(0, 120))
    target, ((height, width),) = batch.targets[0], batch.sizes
    found = HeadOutput(target.boxes, target.labels, torch.ones(1), keypoints=target.keypoints)
    back = in_source_pixels(found, images.annotations[0], width, height)
    assert back.keypoints is not None
    expected = images.annotations[0].keypoints[..., :2]
    np.testing.assert_allclose(back.keypoints[..., :2], expected, atol=1e-4)


def test_it_learns_where_the_dots_are(tmp_path: Path) -> None:
    images = opened(coco_faces(tmp_path / "coco", {"train": 4}))
    made = recipe()
    detector, _ = build_detector(made, "resnet18", 1, None, 0, CPU, keypoints=3)
    read = ImageLoading(images, made.data, ["face"], masks=False)
    samples = [read(ImageRequest(i, 72)) for i in range(4)]
    batch = [s.images[0] for s in samples], [s.targets[0] for s in samples]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    detector.train()
    losses = []
    for _ in range(12):
        loss = detector.losses(*batch)
        optimizer.zero_grad()
        torch.stack(list(loss.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss["loss_keypoint"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_images_without_objects_have_no_keypoint_loss(tmp_path: Path) -> None:
    made = recipe()
    detector, _ = build_detector(made, "resnet18", 1, None, 0, CPU, keypoints=3)
    images = opened(coco_faces(tmp_path / "coco", {"train": 1}))
    sample = ImageLoading(images, made.data, ["face"], masks=False)(ImageRequest(0, 72))
    (target,) = sample.targets
    assert target.keypoints is not None
    unlabelled = target.keypoints.clone()
    unlabelled[..., 2] = 0
    detector.train()
    losses = detector.losses(
        sample.images, [type(target)(target.boxes, target.labels, None, unlabelled)]
    )
    assert losses["loss_keypoint"].item() == 0


def test_numbers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    images = opened(coco_faces(tmp_path / "coco", {"train": 1}))
    data = recipe().data
    with pytest.raises(UsageError, match=r"not given, but objects of .* have 3 keypoints"):
        keypoint_flips(images, data.model_copy(update={"keypoint_flips": None}))
    with pytest.raises(UsageError, match=r"\[0, 1\], but"):
        keypoint_flips(images, data.model_copy(update={"keypoint_flips": [0, 1]}))
    assert keypoint_flips(images, data.model_copy(update={"flip": False})) == []


def _settings(*more: str) -> list[str]:
    return [part for key in (*SET, *more) for part in ("--set", key)]


@pytest.mark.slow
def test_coco_from_keypoints_to_results(tmp_path: Path) -> None:
    tree = coco_faces(tmp_path / "coco", {"train2017": 4, "val2017": 2})
    out = tmp_path / "out"
    command = (
        "evaluate", "coco", "none", "-r", "coco-keypoint-tiny", "--data", tree, "--out", out,
        "--train-split", "train2017", "--test-split", "val2017",
    )  # fmt: skip
    refused = dupr(*command, *_settings(GIVEN[0]), code=2)
    assert "test.keypoint_sigmas" in refused.stderr
    printed = dupr(*command, *_settings(*GIVEN)).stdout
    assert "keypoint_AP" in printed
    (entry,) = json.loads((out / "results.json").read_text())["results"]
    assert {"AP", "keypoint_AP", "keypoint_AR20"} <= entry["metrics"].keys()
    rows = json.loads((out / "01-none" / "seed-0" / "detections.json").read_text())
    assert all(len(row["keypoints"]) == 9 for row in rows)
    (out / "results.json").unlink()
    dupr(*command, *_settings(*GIVEN))  # reads the trial that is finished
    assert json.loads((out / "results.json").read_text())["results"][0] == {
        **entry, "seconds": entry["seconds"]
    }  # fmt: skip


@pytest.mark.slow
def test_yolos_pose_sets_and_shards(tmp_path: Path) -> None:
    file = yolo_faces(tmp_path / "pose" / "data.yaml")
    common = ("evaluate", "yolo", "none", "-r", "yolo-keypoint-tiny", *_settings(GIVEN[1]))
    dupr(*common, "--data", file, "--out", tmp_path / "direct")
    dupr("prepare", file, tmp_path / "shards")
    dupr(*common, "--set", GIVEN[0], "--data", tmp_path / "shards", "--out", tmp_path / "sharded")
    found = [
        json.loads((tmp_path / name / "results.json").read_text())["results"][0]["metrics"]
        for name in ("direct", "sharded")
    ]
    assert found[0].keys() == found[1].keys()
    assert "keypoint_AP" in found[0]
    shutil.rmtree(file.parent / "labels")
    broken = dupr(*common, "--data", file, "--out", tmp_path / "none", code=2)
    assert "Traceback" not in broken.stderr


def _edited(root: Path, change: Any) -> Path:
    """The set with every object of its keypoints' file changed."""
    file = root / "annotations" / "person_keypoints_train.json"
    content = json.loads(file.read_text())
    for number, row in enumerate(content["annotations"]):
        change(number, row)
    file.write_text(json.dumps(content))
    return root


def test_a_set_without_keypoints_is_refused(tmp_path: Path) -> None:
    root = coco_faces(tmp_path / "coco", {"train": 2})
    (root / "annotations" / "person_keypoints_train.json").unlink()
    with pytest.raises(UsageError, match=r"no object has keypoints, but the detector"):
        opened(root)


def test_different_numbers_of_keypoints_are_refused(tmp_path: Path) -> None:
    def shorten(number: int, row: dict[str, Any]) -> None:
        row["keypoints"] = row["keypoints"][: 9 - 3 * number]

    root = _edited(coco_faces(tmp_path / "coco", {"train": 2}), shorten)
    with pytest.raises(UsageError, match=r"different numbers of keypoints \(\[2, 3\]\)"):
        opened(root)


def test_an_object_without_keypoints_stays_and_does_not_count(tmp_path: Path) -> None:
    def forget(number: int, row: dict[str, Any]) -> None:
        if number == 0:
            row["keypoints"], row["num_keypoints"] = [0] * 9, 0

    images = opened(_edited(coco_faces(tmp_path / "coco", {"train": 2}), forget))
    assert len(images.annotations[0].names) == 1
    assert not images.annotations[0].keypoints.any()
    assert images.annotations[1].keypoints[..., 2].all()
