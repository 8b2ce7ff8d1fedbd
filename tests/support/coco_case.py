"""A case of detection in COCO's formats, drawn: what pycocotools says of it is the oracle.

It has what decides COCO's figures: crowds, objects of all three sizes, several of a class in one
image, classes without objects, images without any, wrong and repeated detections, equal scores,
scores below and more detections than COCO keeps.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

_SIDES = (20, 60, 150)  # of small, medium and large objects
_CLASSES = (3, 7, 18, 44)  # the last has no objects


def draw_coco_case(folder: Path, images: int = 40, seed: int = 0) -> tuple[Path, Path]:
    """Annotations and results, as two files in the folder."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        # The last image is crowded with detections; the first has no object.
        for _ in range(0 if image == 1 else int(random.integers(1, 8))):
            side = float(random.choice(_SIDES)) * random.uniform(0.7, 1.3, 2)
            x, y = random.uniform(0, 400, 2).round(2)
            box = [x, y, *side.round(2)]
            category = int(random.choice(_CLASSES[:3]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": round(0.8 * float(side.prod()), 2),
                    "iscrowd": int(random.random() < 0.1),
                    "segmentation": [[x, y, x + side[0], y, x, y + side[1]]],
                }
            )
            for _ in range(int(random.integers(0, 3))):
                moved = np.array(box) + random.normal(0, 4, 4) * side.mean() / 40
                moved[2:] = moved[2:].clip(1)
                named = category if random.random() < 0.9 else int(random.choice(_CLASSES))
                results.append(_found(image, named, moved, random))
        for _ in range(120 if image == images else int(random.integers(0, 4))):
            wrong = np.array([*random.uniform(0, 400, 2), *random.uniform(5, 200, 2)])
            results.append(_found(image, int(random.choice(_CLASSES)), wrong, random))
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 640}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": category, "name": f"class {category}"} for category in _CLASSES],
    }
    truth, found = folder / "instances_drawn.json", folder / "results.json"
    truth.write_text(json.dumps(content))
    found.write_text(json.dumps(results))
    return truth, found


def _found(
    image: int,
    category: int,
    box: np.ndarray[Any, np.dtype[np.float64]],
    random: np.random.Generator,
) -> dict[str, Any]:
    # One digit: many scores are equal.
    score = round(float(random.random()), 1)
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box.round(2).tolist(),
        "score": score,
    }


def add_masks(content: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Masks in all of COCO's forms: objects keep their polygon, or get run lengths, compressed or
    not. The masks of detections are their boxes.
    """
    for number, annotation in enumerate(content["annotations"]):
        if annotation["iscrowd"] or number % 3 == 0:
            mask = _filled(annotation["bbox"])
            annotation["segmentation"] = _run_lengths(mask) if number % 2 else _compressed(mask)
    for row in results:
        row["segmentation"] = _compressed(_filled(row["bbox"]))


def _filled(box: list[float]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    mask = np.zeros((640, 640), dtype=np.uint8)
    x, y, width, height = box
    mask[max(0, int(y)) : int(y + height), max(0, int(x)) : int(x + width)] = 1
    return mask


def _compressed(mask: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    coded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def _run_lengths(mask: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    column_by_column = mask.flatten(order="F")
    runs = np.diff([0, *np.flatnonzero(np.diff(column_by_column, prepend=0)), mask.size])
    return {"size": list(mask.shape), "counts": runs.tolist()}


def evaluated_by_pycocotools(
    content: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    ious: tuple[float, ...] | None = None,
) -> COCOeval:
    """COCOeval after all its steps. ious: thresholds instead of COCO's, which have no stats."""
    content, results = copy.deepcopy((content, results))
    if kind == "segm":
        # By a box, COCO.loadRes would measure the size of a mask.
        for row in results:
            del row["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        if ious is not None:
            evaluation.params.iouThrs = np.array(ious)
        evaluation.evaluate()
        evaluation.accumulate()
        if ious is None:
            evaluation.summarize()
    return evaluation
