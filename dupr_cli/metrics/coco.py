"""COCO's average precision and recall, of boxes and of masks, computed by pycocotools itself.

Objects and detections are written as COCO's JSON and given to COCOeval, whose numbers are returned
unchanged except for the factor of 100. COCO's own files should be given by their content
(`coco_json_scores`), because x + width - x need not equal the width in the file.

Crowd regions follow COCO: a detection that matches one by the threshold counts as neither right nor
wrong. COCO has no difficult objects. Here they are ignored as COCO ignores objects outside a size
range: by ordinary IoU, one detection each, and only when no other object fits.

Source: pycocotools, COCOeval and COCOeval.summarize.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dupr_cli.metrics.types import Detections, Rle, Scores, Truth, threshold_name

# In the order of COCOeval.stats.
STATISTICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
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


def with_masks(boxes: Scores, masks: Scores) -> Scores:
    """Merge both; the names for masks begin with segm_."""

    def joined(of_boxes: dict[str, float], of_masks: dict[str, float]) -> dict[str, float]:
        return {**of_boxes, **{f"segm_{name}": value for name, value in of_masks.items()}}

    return Scores(
        joined(boxes.metrics, masks.metrics),
        {name: joined(row, masks.per_class.get(name, {})) for name, row in boxes.per_class.items()},
    )


def truths_json(truths: Sequence[Truth], classes: Sequence[str]) -> Json:
    """The content of a COCO file: images 1 to n, categories 1 to the number of classes."""
    annotations: list[Json] = []
    for image, truth in enumerate(truths, 1):
        for number, (box, label) in enumerate(zip(truth.boxes, truth.labels, strict=True)):
            annotation = {
                **_entry(image, box, label, truth.masks, number),
                "id": len(annotations) + 1,
                "iscrowd": int(truth.crowd is not None and truth.crowd[number]),
            }
            annotation["area"] = _area(truth, number, annotation)
            annotations.append(annotation)
    return {
        "images": [_size(image, truth.masks) for image, truth in enumerate(truths, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": annotations,
    }


def detections_json(detections: Sequence[Detections]) -> list[Json]:
    """The content of a COCO results file, for the numbers of `truths_json`."""
    return [
        {**_entry(image, box, label, found.masks, number), "score": float(found.scores[number])}
        for image, found in enumerate(detections, 1)
        for number, (box, label) in enumerate(zip(found.boxes, found.labels, strict=True))
    ]


def _entry(
    image: int, box: np.ndarray[Any, Any], label: int, masks: tuple[Rle, ...] | None, number: int
) -> Json:
    x_min, y_min, x_max, y_max = (float(edge) for edge in box)
    entry: Json = {
        "image_id": image,
        "category_id": int(label) + 1,
        "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
    }
    if masks is not None:
        entry["segmentation"] = dict(masks[number])
    return entry


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
) -> Scores:
    """COCOeval on the content of COCO's files. kind: bbox or segm.

    Annotations may lack iscrowd, area (the box's area is used) and id. Classes without an object
    to find are left out, as are numbers that COCOeval reports as -1.
    Raises ValueError when no class has an object to find.
    """
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        # COCOeval writes into the entries. It takes the id 0 for "not found" and merges entries
        # with the same id, so all ids are renumbered; the order in the file stays.
        truth.dataset = {
            **content,
            "annotations": [
                {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": number}
                for number, a in enumerate(content.get("annotations") or [], 1)
            ],
        }
        truth.createIndex()
        found = _results(truth, [dict(row) for row in results], kind)
        main, stats = _evaluate(truth, found, kind)
        more = _evaluate(truth, found, kind, ious)[0] if ious else None
    rows = {
        category["name"]: row
        for place, category in enumerate(sorted(content["categories"], key=lambda c: c["id"]))
        if (row := _class_row(main, more, place, ious))
    }
    if not rows:
        raise ValueError("no class has an object to find")
    metrics = dict(zip(STATISTICS, (100 * stats).tolist(), strict=True))
    for iou in ious:
        name = threshold_name(iou)
        metrics.setdefault(name, float(np.mean([row[name] for row in rows.values()])))
    return Scores({name: value for name, value in metrics.items() if value >= 0}, rows)


def _results(truth: Any, rows: list[Json], kind: str) -> Any:
    if rows and kind == "segm":
        # With a box, COCO uses its area for the mask, which would change small and large.
        for row in rows:
            row.pop("bbox", None)
    if rows:
        return truth.loadRes(rows)
    # loadRes rejects an empty list.
    empty = type(truth)()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _evaluate(
    truth: Any, found: Any, kind: str, ious: Sequence[float] | None = None
) -> tuple[Any, np.ndarray[Any, np.dtype[np.float64]]]:
    """Precision (T, 101, classes, sizes, detections per image), -1 where undefined; and stats."""
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(truth, found, kind)
    if ious is not None:
        evaluation.params.iouThrs = np.array(ious, dtype=np.float64)
    evaluation.evaluate()
    evaluation.accumulate()
    if ious is None:
        evaluation.summarize()
    return evaluation.eval["precision"], np.array(evaluation.stats)


def _class_row(main: Any, more: Any, place: int, ious: Sequence[float]) -> dict[str, float]:
    """AP, AP50, AP75 of one class, all sizes, 100 detections; empty if it has no object."""
    precision = main[:, :, place, 0, -1]
    if precision[0, 0] < 0:
        return {}
    # The thresholds are 0.50, 0.55, ... 0.95.
    row = {"AP": precision.mean(), "AP50": precision[0].mean(), "AP75": precision[5].mean()}
    for number, iou in enumerate(ious):
        row.setdefault(threshold_name(iou), more[number, :, place, 0, -1].mean())
    return {name: 100 * float(value) for name, value in row.items()}
