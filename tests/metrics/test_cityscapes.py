"""Cityscapes' average precision against cityscapesScripts, and on cases worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from dupr_cli.datasets.cityscapes import CityscapesSplit
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.errors import UsageError
from dupr_cli.metrics import Detections, Rle, Truth, score
from dupr_cli.metrics.cityscapes import cityscapes_scores
from dupr_cli.progress import SilentReporter

CLASSES = ["bicycle", "bus", "car", "motorcycle", "person", "rider", "train", "truck"]
IDS = {"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
       "bicycle": 33}  # fmt: skip
SIZE = 128, 160


def rle(mask: NDArray[np.bool_]) -> Rle:
    coded = coco_mask.encode(np.asfortranarray(mask))
    return Rle(size=list(coded["size"]), counts=coded["counts"].decode())


def square(top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def detections(masks: Sequence[NDArray[np.bool_]], scores: Sequence[float], label: int = 0) -> Any:
    return Detections(
        np.zeros((len(masks), 4)), np.full(len(masks), label), np.array(scores),
        tuple(rle(mask) for mask in masks),
    )  # fmt: skip


def truth(masks: Sequence[NDArray[np.bool_]], **more: Any) -> Truth:
    count = len(masks)
    return Truth(
        np.zeros((count, 4)), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool),
        masks=tuple(rle(mask) for mask in masks), **more,
    )  # fmt: skip


def ap50(truths: list[Truth], found: list[Detections]) -> float:
    return cityscapes_scores(truths, found, ["car"]).metrics["cityscapes_AP50"]


CAR, OTHER, SMALL = square(0, 0, 20, 20), square(30, 30, 20, 20), square(0, 60, 9, 9)


def test_the_ground_truth_scores_100() -> None:
    truths = [truth([CAR, OTHER]), truth([OTHER])]
    found = [detections([CAR, OTHER], [0.9, 0.8]), detections([OTHER], [0.3])]
    metrics = cityscapes_scores(truths, found, ["car"]).metrics
    assert metrics == pytest.approx({"cityscapes_AP": 100, "cityscapes_AP50": 100})


def test_small_instances_and_groups_and_void_are_neither_right_nor_wrong() -> None:
    found = [detections([CAR, SMALL], [0.5, 0.9])]
    assert ap50([truth([CAR, SMALL])], found) == 100  # 81 pixels: too few to count
    group = np.array([False, True])
    found = [detections([CAR, OTHER], [0.5, 0.9])]
    assert ap50([truth([CAR, OTHER], crowd=group)], found) == 100
    assert ap50([truth([CAR], void=rle(OTHER))], found) == 100
    # Wrong: the surer of two detections is of nothing. The curve goes through precision 1/2 at
    # recall 1, 0 at 0 and, as every curve, 1 at 0; the first two stand for half of the recall each.
    assert ap50([truth([CAR])], found) == pytest.approx(25)


def test_an_overlap_must_exceed_the_threshold() -> None:
    half = square(0, 0, 10, 20)
    assert ap50([truth([CAR])], [detections([half], [0.9])]) == 0
    assert ap50([truth([CAR])], [detections([square(0, 0, 11, 20)], [0.9])]) == 100


def test_a_second_detection_of_an_instance_is_wrong() -> None:
    found = [detections([CAR, CAR, OTHER], [0.5, 0.9, 0.3])]
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1, and 1 at 0; each stands for a quarter.
    expected = 100 * (1 + 1 / 2 + 2 / 3 + 1) / 4
    assert ap50([truth([CAR, OTHER])], found) == pytest.approx(expected)


def test_nothing_to_find() -> None:
    scores = cityscapes_scores([truth([SMALL])], [detections([], [])], ["car"])
    assert not scores.metrics
    assert not scores.per_class


def test_masks_are_needed() -> None:
    without = Truth(np.zeros((1, 4)), np.array([0]), np.array([False]))
    with pytest.raises(ValueError, match="needs the masks"):
        cityscapes_scores([without], [detections([], [])], ["car"])


def _scene(random: np.random.Generator) -> tuple[NDArray[np.int32], list[tuple[str, Any, float]]]:
    """instanceIds of a random scene, and detections near its objects and elsewhere."""
    ids = np.full(SIZE, 7, dtype=np.int32)
    ids[:5] = random.choice([1, 4, 29, 30])  # void
    found = []
    for number in range(int(random.integers(1, 9))):
        name = str(random.choice(CLASSES[:3]))
        top, left = random.integers(0, 100), random.integers(0, 130)
        height, width = random.integers(3, 60, 2)
        group = random.random() < 0.25
        ids[top : top + height, left : left + width] = (
            IDS[name] if group else IDS[name] * 1000 + number
        )
        for _ in range(int(random.integers(0, 3))):
            dy, dx = random.integers(-3, 4, 2)
            mask = square(max(top + dy, 0), max(left + dx, 0), height, width)
            found.append((name, mask, float(random.integers(1, 20)) / 20))
    return ids, found


def _write(root: Path, random: np.random.Generator, images: int, distances: bool) -> list[Any]:
    for kind in ("leftImg8bit", "gtFine"):
        (root / kind / "val" / "town").mkdir(parents=True)
    every, instances = [], {}
    for number in range(images):
        ids, found = _scene(random)
        name = f"town_{number:06d}_000019"
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(
            root / "leftImg8bit" / "val" / "town" / f"{name}_leftImg8bit.png"
        )
        path = root / "gtFine" / "val" / "town" / f"{name}_gtFine_instanceIds.png"
        Image.fromarray(ids.astype(np.uint16)).save(path)
        every.append(found)
        names = {value: key for key, value in IDS.items()}
        of_image: dict[str, list[dict[str, float]]] = {key: [] for key in IDS}
        for value in np.unique(ids).tolist():
            if (label := names.get(value // 1000 if value >= 1000 else value)) is not None:
                of_image[label].append({
                    "instID": value, "labelID": IDS[label], "pixelCount": int((ids == value).sum()),
                    "medDist": float(random.integers(10, 150)),
                    "distConf": float(random.random()),
                })  # fmt: skip
        instances[str(path)] = of_image
    if distances:
        (root / "gtFine" / "gtInstances.json").write_text(json.dumps(instances))
    return every


def _detections(scenes: list[Any]) -> list[Detections]:
    return [
        Detections(
            np.zeros((len(found), 4)),
            np.array([CLASSES.index(name) for name, _, _ in found], dtype=np.int64),
            np.array([confidence for _, _, confidence in found]),
            tuple(rle(mask) for _, mask, _ in found),
        )
        for found in scenes
    ]


def _official(
    root: Path, scenes: list[Any], distances: bool, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The figures of cityscapesScripts, from files in its own form."""
    # Version 2.3.0 calls a function that NumPy no longer has.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    evaluation = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        reason="cityscapesScripts is not installed",
    )
    truths = sorted(map(str, (root / "gtFine").glob("val/*/*_instanceIds.png")))
    predictions = []
    for path, found in zip(truths, scenes, strict=True):
        lines = []
        stem = Path(path).name.removesuffix("_gtFine_instanceIds.png")
        for number, (name, mask, confidence) in enumerate(found):
            file = root / "results" / f"{stem}_{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
            lines.append(f"{file.name} {IDS[name]} {confidence}")
        listed = root / "results" / f"{stem}.txt"
        listed.parent.mkdir(exist_ok=True)
        listed.write_text("\n".join(lines) + "\n" if lines else "")
        predictions.append(str(listed))
    args = evaluation.args
    args.quiet, args.JSONOutput = True, False
    args.predictionPath = str(root / "results")
    args.gtInstancesFile = str(root / ("gtFine/gtInstances.json" if distances else "own.json"))
    args.distanceAvailable = distances
    evaluation.setInstanceLabels(args)
    instances = evaluation.getGtInstances(truths, args)
    matches = evaluation.matchGtWithPreds(predictions, truths, instances, args)
    with np.errstate(all="ignore"):
        found = evaluation.computeAverages(evaluation.evaluateMatches(matches, args), args)
    return cast("dict[str, Any]", found)


# Figures of cityscapesScripts 2.3.0 for the scenes of four seeds, in percent: all, and within 50 m.
KEPT = {
    0: (31.488000755857897, 90.0),
    1: (27.44444444444445, 0.0),
    2: (13.509268509268507, None),
    3: (22.723214285714285, 31.25),
}


@pytest.mark.parametrize("seed", KEPT)
def test_the_figures_are_those_that_were_kept(seed: int, tmp_path: Path) -> None:
    scenes = _write(tmp_path, np.random.default_rng(seed), 6, True)
    labelled = open_labelled(str(tmp_path), ["val"], SilentReporter(), masks=True)
    truths = [labelled.truth(i, CLASSES) for i in range(len(labelled))]
    metrics = cityscapes_scores(truths, _detections(scenes), CLASSES).metrics
    found = metrics["cityscapes_AP"], metrics.get("cityscapes_AP_50m")
    assert found == pytest.approx(KEPT[seed])


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_cityscapesscripts(
    seed: int, distances: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    scenes = _write(tmp_path, random, 6, distances)
    official = _official(tmp_path, scenes, distances, monkeypatch)
    labelled = open_labelled(str(tmp_path), ["val"], SilentReporter(), masks=True)
    truths = [labelled.truth(i, CLASSES) for i in range(len(labelled))]
    found = cityscapes_scores(truths, _detections(scenes), CLASSES)
    expected = {"cityscapes_AP": "allAp", "cityscapes_AP50": "allAp50%"}
    if distances and not np.isnan(official["allAp50m"]):
        expected |= {"cityscapes_AP_50m": "allAp50m", "cityscapes_AP50_50m": "allAp50%50m"}
    if distances and not np.isnan(official["allAp100m"]):
        expected["cityscapes_AP_100m"] = "allAp100m"
    for ours, theirs in expected.items():
        assert found.metrics[ours] == pytest.approx(100 * official[theirs], abs=1e-9), ours
    for name in CLASSES:
        theirs = official["classes"][name]["ap"]
        assert (name in found.per_class) == (not np.isnan(theirs))
        if name in found.per_class:
            row = found.per_class[name]
            assert row["cityscapes_AP"] == pytest.approx(100 * theirs, abs=1e-9)


def test_cocos_figures_stand_beside() -> None:
    box = np.array([[0.0, 0, 20, 20]])
    truths = [Truth(box, np.array([0]), np.array([False]), masks=(rle(CAR),))]
    found = [Detections(box, np.array([0]), np.array([0.5]), (rle(CAR),))]
    scores = score("cityscapes", truths, found, ["car"])
    assert {"AP", "segm_AP", "cityscapes_AP"} <= scores.metrics.keys()
    assert {"AP", "segm_AP", "cityscapes_AP"} <= scores.per_class["car"].keys()


def test_damaged_distances_are_named(tmp_path: Path) -> None:
    _write(tmp_path, np.random.default_rng(0), 1, True)
    (tmp_path / "gtFine" / "gtInstances.json").write_text('{"a": [1]}')
    with pytest.raises(UsageError, match="not the instances that cityscapesScripts writes"):
        CityscapesSplit(tmp_path, "val")
