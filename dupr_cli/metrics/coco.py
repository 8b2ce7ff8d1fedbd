"""COCO's average precision and recall, of boxes, masks and keypoints, computed by faster-coco-eval.

Objects and detections are written as COCO's JSON and given to COCOeval_faster, whose numbers are
returned as percentages. They equal those of pycocotools to the last bit, for which the precision of
a single detection needs a correction (`_as_pycocotools_rounds`). COCO's own files should be given
by their content (`coco_json_scores`), because x + width - x need not equal the width in the file.

Crowd regions follow COCO: a detection that matches one by the threshold counts as neither right nor
wrong. COCO has no difficult objects. Here they are ignored as COCO ignores objects outside a size
range: by ordinary IoU, one detection each, and only when no other object fits.

Source: pycocotools, COCOeval and COCOeval.summarize.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dupr_cli.metrics.types import (
    COCO_SIGMAS,
    Detections,
    Floats,
    Integers,
    Rle,
    Scores,
    Truth,
    threshold_name,
)

# In the order of COCOeval.stats.
STATISTICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip

KEYPOINT_STATISTICS = (
    "AP", "AP50", "AP75", "APm", "APl", "AR20", "AR50", "AR75", "ARm", "ARl",
)  # fmt: skip

# An area outside every size range, even that of all sizes, so that COCOeval ignores the object.
_IGNORED_AREA = -1.0

Json = dict[str, Any]


def coco_scores(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    ious: Sequence[float] = (),
) -> Scores:
    """COCO's twelve numbers for boxes, AP, AP50 and AP75 of each class, and AP at each of `ious`.

    Raises ValueError when no class has an object that is neither difficult nor crowd.
    """
    content = truths_json(truths, classes)
    return coco_json_scores(content, detections_json(detections), "bbox", ious)


def coco_segm_scores(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    ious: Sequence[float] = (),
) -> Scores:
    """The numbers of `coco_scores`, with those of the masks beside them as segm_AP and so on.

    Raises ValueError when an image with objects or detections has no masks.
    """
    entries: list[Truth | Detections] = [*truths, *detections]
    if any(entry.masks is None and len(entry.labels) for entry in entries):
        raise ValueError("coco-segm needs the masks of all objects and detections")
    content, results = truths_json(truths, classes), detections_json(detections)
    boxes = coco_json_scores(content, results, "bbox", ious)
    return with_masks(boxes, coco_json_scores(content, results, "segm", ious))


def coco_keypoint_scores(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    classes: Sequence[str],
    sigmas: Sequence[float] | Mapping[str, Sequence[float]],
    ious: Sequence[float] = (),
) -> Scores:
    """The numbers of `coco_scores`, with those of keypoints beside them as keypoint_AP and so on.

    An object counts for keypoints if one of its keypoints is labelled. sigmas: one per keypoint,
    for all classes or for each by its name.
    Raises ValueError when no object counts, or objects or detections have no keypoints.
    """
    entries: list[Truth | Detections] = [*truths, *detections]
    if any(entry.keypoints is None and len(entry.labels) for entry in entries):
        raise ValueError("coco-keypoints needs the keypoints of all objects and detections")
    content, results = truths_json(truths, classes), detections_json(detections)
    boxes = coco_json_scores(content, results, "bbox", ious)
    if not isinstance(sigmas, Mapping):
        return with_keypoints(boxes, coco_json_scores(content, results, "keypoints", ious, sigmas))
    # COCOeval has the same sigmas for all classes, and every one of its figures is a mean over
    # classes, so that one class at a time gives the same.
    by_class: list[Scores] = []
    for number, name in enumerate(classes, 1):
        of_class = [row for row in content["annotations"] if row["category_id"] == number]
        if not any(row["num_keypoints"] and not row["iscrowd"] for row in of_class):
            continue
        part = {
            **content,
            "categories": [{"id": number, "name": name}],
            "annotations": of_class,
        }
        found = [row for row in results if row["category_id"] == number]
        by_class.append(coco_json_scores(part, found, "keypoints", ious, sigmas[name]))
    if not by_class:
        raise ValueError("no class has an object with keypoints to find")
    names = dict.fromkeys(name for scores in by_class for name in scores.metrics)
    metrics = {
        name: float(np.mean([one.metrics[name] for one in by_class if name in one.metrics]))
        for name in names
    }
    rows = {name: row for one in by_class for name, row in one.per_class.items()}
    return with_keypoints(boxes, Scores(metrics, rows))


def with_masks(boxes: Scores, masks: Scores) -> Scores:
    """Merge both; the names for masks begin with segm_."""
    return joined_scores(boxes, masks, "segm_")


def with_keypoints(boxes: Scores, keypoints: Scores) -> Scores:
    """Merge both; the names for keypoints begin with keypoint_."""
    return joined_scores(boxes, keypoints, "keypoint_")


def joined_scores(first: Scores, second: Scores, prefix: str = "") -> Scores:
    """Both scores; the names of the second get the prefix."""

    def joined(of_first: dict[str, float], of_second: dict[str, float]) -> dict[str, float]:
        return {**of_first, **{f"{prefix}{name}": value for name, value in of_second.items()}}

    return Scores(
        joined(first.metrics, second.metrics),
        {
            name: joined(row, second.per_class.get(name, {}))
            for name, row in first.per_class.items()
        },
    )


def truths_json(truths: Sequence[Truth], classes: Sequence[str]) -> Json:
    """The content of a COCO file: images 1 to n, categories 1 to the number of classes."""
    annotations: list[Json] = []
    for image, truth in enumerate(truths, 1):
        for number, annotation in enumerate(_entries(image, truth)):
            annotation["id"] = len(annotations) + 1
            annotation["iscrowd"] = int(truth.crowd is not None and truth.crowd[number])
            annotation["area"] = _area(truth, number, annotation)
            if truth.keypoints is not None:
                annotation["num_keypoints"] = int((truth.keypoints[number, :, 2] > 0).sum())
            annotations.append(annotation)
    return {
        "images": [_size(image, truth.masks) for image, truth in enumerate(truths, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": annotations,
    }


def detections_json(detections: Sequence[Detections]) -> list[Json]:
    """The content of a COCO results file, for the numbers of `truths_json`."""
    results: list[Json] = []
    for image, found in enumerate(detections, 1):
        entries = _entries(image, found)
        for entry, score in zip(entries, found.scores.tolist(), strict=True):
            entry["score"] = score
        results += entries
    return results


def _entries(image: int, objects: Truth | Detections) -> list[Json]:
    corners = np.asarray(objects.boxes, dtype=np.float64).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    categories = (np.asarray(objects.labels) + 1).tolist()
    entries = [
        {"image_id": image, "category_id": category, "bbox": box}
        for category, box in zip(categories, boxes, strict=True)
    ]
    for entry, mask in zip(entries, objects.masks or (), strict=objects.masks is not None):
        entry["segmentation"] = dict(mask)
    if objects.keypoints is not None:
        for entry, points in zip(entries, objects.keypoints, strict=True):
            entry["keypoints"] = np.asarray(points, dtype=np.float64).reshape(-1).tolist()
    return entries


def _size(image: int, masks: tuple[Rle, ...] | None) -> Json:
    if not masks:
        return {"id": image}
    height, width = masks[0]["size"]
    return {"id": image, "height": height, "width": width}


def _area(truth: Truth, number: int, annotation: Json) -> float:
    if truth.difficult[number]:
        return _IGNORED_AREA
    if truth.areas is not None:
        return float(truth.areas[number])
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def coco_json_scores(
    content: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: str,
    ious: Sequence[float] = (),
    sigmas: Sequence[float] = COCO_SIGMAS,
) -> Scores:
    """COCO's metric on the content of COCO's files. kind: bbox, segm or keypoints.

    sigmas: of keypoints. Annotations may lack iscrowd, area (the box's area is used) and id.
    Classes without an object to find are left out, as are numbers that COCOeval reports as -1.
    Raises ValueError when no class has an object to find.
    """
    precision, stats = _evaluate(*_numbered(content, results, kind), kind, ious, sigmas)
    # Categories have the numbers of their places in the order of ids.
    rows = {
        category["name"]: row
        for place, category in enumerate(sorted(content["categories"], key=_order))
        if (row := _class_row(precision, place, ious))
    }
    names = KEYPOINT_STATISTICS if kind == "keypoints" else STATISTICS
    metrics = dict(zip(names, (100 * stats).tolist(), strict=True))
    for iou in ious:
        name = threshold_name(iou)
        metrics.setdefault(name, float(np.mean([row[name] for row in rows.values()])))
    return Scores({name: value for name, value in metrics.items() if value >= 0}, rows)


def _order(row: Mapping[str, Any]) -> tuple[bool, Any]:
    """Numbers before text: ids may be either."""
    return isinstance(row["id"], str), row["id"]


def _numbered(
    content: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str
) -> tuple[Json, Json]:
    """Both files with only what the metric reads, and with whole numbers as ids.

    COCOeval writes into the entries, so they are copies. faster-coco-eval needs whole numbers;
    COCOeval takes the id 0 for "not found" and merges entries with the same id. The order of ids,
    which decides between equal scores, stays, as does the order in the files.
    """
    images = sorted(content["images"], key=_order)
    image_ids = {image["id"]: number for number, image in enumerate(images, 1)}
    categories = sorted(content["categories"], key=_order)
    category_ids = {category["id"]: number for number, category in enumerate(categories, 1)}
    region = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    of_points = kind == "keypoints"
    objects = [
        {
            "id": number,
            "image_id": image_ids[row["image_id"]],
            "category_id": category_ids[row["category_id"]],
            region: row[region],
            "area": row["area"] if "area" in row else row["bbox"][2] * row["bbox"][3],
            "iscrowd": row.get("iscrowd", 0),
            # The box of an object without a labelled keypoint stands for its keypoints.
            **({"bbox": row["bbox"], "num_keypoints": row["num_keypoints"]} if of_points else {}),
        }
        for number, row in enumerate(content.get("annotations") or [], 1)
    ]
    found = [
        {
            "id": number,
            "image_id": image_ids[row["image_id"]],
            "category_id": category_ids[row["category_id"]],
            region: of_row,
            "area": area,
            "score": row["score"],
        }
        for number, (row, of_row, area) in enumerate(
            zip(results, *_regions(results, kind), strict=True), 1
        )
    ]
    shared = {
        "images": [{**image, "id": number} for number, image in enumerate(images, 1)],
        "categories": [{"id": number} for number in category_ids.values()],
    }
    return {**shared, "annotations": objects}, {**shared, "annotations": found}


def _regions(results: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[Any], list[float]]:
    """Boxes or masks of detections, and their areas.

    The area of a mask is its own, also where the results have a box for it. If they have no boxes,
    these follow from the masks, and COCO.loadRes keeps the masks' areas for them.
    """
    if kind == "bbox" and all("bbox" in row for row in results):
        boxes = [row["bbox"] for row in results]
        return boxes, [width * height for _, _, width, height in boxes]
    if kind == "keypoints":
        points = [row["keypoints"] for row in results]
        corners = np.array([_extent(flat) for flat in points]).reshape(-1, 4)
        sides = corners[:, 2:] - corners[:, :2]
        return points, sides.prod(axis=1).tolist()
    masks = [row["segmentation"] for row in results]
    # One by one, because pycocotools cannot count more than 255 masks at a time.
    areas = [float(coco_mask.area(mask)) for mask in masks]
    return (masks if kind == "segm" else coco_mask.toBbox(masks).tolist()), areas


def _extent(flat: Sequence[float]) -> list[float]:
    """x_min, y_min, x_max, y_max of keypoints [x, y, score, ...]."""
    return [min(flat[0::3]), min(flat[1::3]), max(flat[0::3]), max(flat[1::3])]


def _evaluate(
    objects: Json, found: Json, kind: str, ious: Sequence[float], sigmas: Sequence[float]
) -> tuple[Floats, Floats]:
    """Precision (T, 101, classes, sizes, detections per image), -1 where undefined; and stats.

    T: COCO's ten thresholds of IoU, then `ious`. Raises ValueError when there is nothing to find.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    evaluation = COCOeval_faster(COCO(objects), COCO(found), kind)
    settings = evaluation.params
    if kind == "keypoints":
        settings.kpt_oks_sigmas = np.array(sigmas)
    positives = _objects_to_find(objects, settings.areaRng)
    if not positives.any():
        raise ValueError("no class has an object to find")
    thresholds, recalls = settings.iouThrs, settings.recThrs
    settings.iouThrs = np.array([*thresholds, *ious])
    settings.recThrs = np.concatenate([recalls, _recalls_of_a_second(positives)])
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    precision = _as_pycocotools_rounds(curves["precision"], len(recalls), positives)
    settings.iouThrs = thresholds
    curves["precision"] = precision[: len(thresholds)]
    curves["recall"] = curves["recall"][: len(thresholds)]
    evaluation.summarize()
    count = len(KEYPOINT_STATISTICS if kind == "keypoints" else STATISTICS)
    return precision, np.array(evaluation.stats[:count])


def _objects_to_find(objects: Json, area_ranges: Sequence[Sequence[float]]) -> Integers:
    """(classes, sizes) number of objects that are neither crowd nor of another size, and have a
    keypoint if keypoints are measured."""
    counts = np.zeros((len(objects["categories"]), len(area_ranges)), dtype=np.int64)
    for entry in objects["annotations"]:
        if not entry["iscrowd"] and entry.get("num_keypoints", 1):
            fits = [low <= entry["area"] <= high for low, high in area_ranges]
            counts[entry["category_id"] - 1] += fits
    return counts


def _recalls_of_a_second(positives: Integers) -> Floats:
    """2, 1, 1/2, 1/4, ...: for any number n of objects, one lies above 1/n and not above 2/n.

    It is the one at the position of the bit length of n - 1.
    """
    recalls: Floats = np.ldexp(1.0, 1 - np.arange(1 + int(positives.max() - 1).bit_length()))
    return recalls


def _as_pycocotools_rounds(precision: Floats, recalls: int, positives: Integers) -> Floats:
    """The precision at the first `recalls` recalls; the others are those of a second found object.

    pycocotools adds np.spacing(1) to the number of detections. That alters the quotient of a single
    detection only, to 1 - 2.2e-16. Where two objects are found before the first wrong detection,
    their precision of 1 replaces it; otherwise nothing else on the curve reaches 1.
    """
    # frexp's exponent of a whole number is its bit length.
    place = recalls + np.frexp(np.maximum(positives - 1, 0))[1]
    second = np.take_along_axis(precision, place[None, None, :, :, None], axis=1)
    curves = precision[:, :recalls]
    return np.where((curves == 1) & (second < 1), 1 / (1 + float(np.spacing(1))), curves)


def _class_row(precision: Floats, place: int, ious: Sequence[float]) -> dict[str, float]:
    """AP, AP50, AP75 of one class, all sizes, 100 detections; empty if it has no object."""
    curves = precision[:, :, place, 0, -1]
    if curves[0, 0] < 0:
        return {}
    # The thresholds are 0.50, 0.55, ... 0.95, then `ious`.
    row = {"AP": curves[:10].mean(), "AP50": curves[0].mean(), "AP75": curves[5].mean()}
    for curve, iou in zip(curves[10:], ious, strict=True):
        row.setdefault(threshold_name(iou), curve.mean())
    return {name: 100 * float(value) for name, value in row.items()}
