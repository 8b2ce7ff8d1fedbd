"""Score detections of any origin: VOC's text files, COCO's results, or an evaluation's own.

    comp4_det_test_dog.txt   one file per class, `image score xmin ymin xmax ymax` a line, pixels
                             counted from 1 with both ends inside, as the development kit has them
    results.json             a list of {image_id, category_id, bbox: [x, y, width, height], score},
                             and segmentation if they have masks: COCO's result format
    detections.json          the detections of a trial of `dupr evaluate voc`; only the images that
                             results.json of its evaluation lists as tested are scored

Only annotations are needed, not images. Nothing is clipped, rounded or dropped, so the figures
equal those of the kit or of pycocotools for the same files.
Sources: the VOC development kit, COCO's result format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.files import write_json, write_text
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.results import RESULTS, Results, image_ids_digest
from dupr_cli.artifacts.shards import MANIFEST
from dupr_cli.datasets.coco import (
    CocoSet,
    coco_box,
    coco_files,
    coco_split_file,
    is_number,
    parse_coco,
    read_json,
)
from dupr_cli.datasets.labelled import open_labelled
from dupr_cli.datasets.text import read_text
from dupr_cli.datasets.voc import VocSplit, find_voc_trees
from dupr_cli.datasets.yolo import is_yolo
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.results_table import DetectionRow, detections_from_rows
from dupr_cli.metrics import METRIC_NAMES, Detections, Metric, Points, Scores, Truth, score
from dupr_cli.metrics.analysis import analyse
from dupr_cli.metrics.coco import coco_json_scores, with_masks
from dupr_cli.metrics.drawing import write_analysis
from dupr_cli.outside_text import one_line
from dupr_cli.parsing import ParseError, parse_json
from dupr_cli.progress import SilentReporter
from dupr_cli.runtime.output import require_own, writing

TABLE_FILE = "table.txt"
_RESULT_KEYS = ("image_id", "category_id", "bbox", "segmentation", "score")
_SIDES = ("height", "width")


@dataclass(frozen=True)
class Scored:
    """metrics, per_class: in percent. notes: caveats for a reader of the figures."""

    metric: Metric
    metric_name: str
    data: str
    split: str
    images: int
    objects: int
    detections: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    notes: list[str]
    format_version: int = 1


@dataclass(frozen=True)
class _Labels:
    """Annotations to score against. ids: image names in an evaluation. names: image names in text
    files, without year and suffix.

    content: the usable rows of COCO's JSON, None for a VOC tree. coco: the parsed content.
    left_out: annotations that could not be used, and why.
    """

    data: str
    split: str
    ids: list[str]
    names: list[str]
    classes: list[str]
    truths: list[Truth]
    left_out: list[str]
    content: dict[str, Any] | None = None
    coco: CocoSet | None = None


def score_files(
    files: Sequence[Path],
    data: str,
    split: str,
    metric: Metric,
    ious: Sequence[float] = (),
    out: Path | None = None,
) -> Scored:
    """Score the detections in `files` against a split of a VOC tree, of a YOLO set or of labelled
    shards, or against COCO's JSON.

    ious: further thresholds whose AP is added. out: a folder for results.json, table.txt and the
    analysis. Raises UsageError, with file and line, for anything that breaks its format.
    """
    labels = _read_labels(data, split)
    notes: list[str] = []
    content = None if len(files) > 1 or files[0].suffix == ".txt" else _read_list(files[0])
    # An empty list fits both formats; against a tree it can only come from an evaluation.
    own_rows = content is not None and ("box" in content[0] if content else not labels.content)
    if content is None:
        found = _from_text(files, labels)
    elif own_rows:
        labels, notes = _restrict_to_tested(files[0], labels)
        found = _from_rows(content, files[0], labels)
    else:
        found = _from_results(content, files[0], labels)
    notes += _notes(labels, found)
    try:
        if content is not None and not own_rows and labels.coco and metric == "coco":
            assert labels.content is not None
            metric, scores, further = _as_pycocotools(labels.content, labels.coco, content, ious)
            notes += further
        else:
            scores = score(metric, labels.truths, found, labels.classes, ious)
    except ValueError as error:
        message = "; ".join([str(error), *notes])
        raise UsageError(f"{data}, split {split}: {message}.") from error
    scored = Scored(
        metric=metric,
        metric_name=METRIC_NAMES[metric],
        data=data,
        split=split,
        images=len(labels.ids),
        objects=sum(int((~_ignored(truth)).sum()) for truth in labels.truths),
        detections=sum(len(of_image.labels) for of_image in found),
        metrics=scores.metrics,
        per_class=scores.per_class,
        notes=notes,
    )
    if out is not None:
        _write(out, scored, labels, found)
    return scored


def _as_pycocotools(
    content: Mapping[str, Any],
    coco: CocoSet,
    results: Sequence[Mapping[str, Any]],
    ious: Sequence[float],
) -> tuple[Metric, Scores, list[str]]:
    """Score boxes, and masks if everything has one; returns the metric, the scores and notes."""
    masks, notes = any("segmentation" in row for row in results), []
    missing = _without_masks(content, results) if masks else ""
    if missing:
        notes.append(f"masks are not scored: {missing}")
    if _miscounted(content):
        notes.append(
            "annotations have the id 0, share an id, or have one that is no number, which "
            "pycocotools by itself miscounts; they are renumbered"
        )
    # COCO.loadRes takes rows with a caption or keypoints for results of another task.
    first = {name: category for category, name in reversed(coco.categories.items())}
    rows = [
        {
            **{key: row[key] for key in _RESULT_KEYS if key in row},
            "category_id": first[coco.categories[row["category_id"]]],
        }
        for row in results
    ]
    boxes = coco_json_scores(content, rows, "bbox", ious)
    if not masks or missing:
        return "coco", boxes, notes
    return "coco-segm", with_masks(boxes, coco_json_scores(content, rows, "segm", ious)), notes


def _miscounted(content: Mapping[str, Any]) -> bool:
    ids = [a["id"] for a in content.get("annotations") or [] if "id" in a]
    return any(type(id_) is not int for id_ in ids) or 0 in ids or len(set(ids)) < len(ids)


def _without_masks(content: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Name the first thing without a mask; empty if everything has one."""
    for number, row in enumerate(results, 1):
        if "segmentation" not in row:
            return f"detection {number} has no mask"
    for number, annotation in enumerate(content.get("annotations") or [], 1):
        mask = annotation.get("segmentation")
        # A polygon needs at least three points.
        if not mask or (isinstance(mask, list) and any(len(polygon) < 6 for polygon in mask)):
            return f"annotation {annotation.get('id', f'number {number}')} has no mask"
    if not all(is_number(image.get(side)) for image in content["images"] for side in _SIDES):
        return "the images have no height and width"
    return ""


def _write(out: Path, scored: Scored, labels: _Labels, found: Sequence[Detections]) -> None:
    points: Points = "voc07" if scored.metric == "voc07" else "voc10"
    with writing(out, "dupr evaluate detections"):
        require_own(out, RESULTS, ("metric_name", "detections"), "scored detections")
        write_analysis(out, analyse(labels.truths, found, labels.classes, points))
        write_text(out / TABLE_FILE, scored_table(scored))
        write_json(out / RESULTS, asdict(scored))


def scored_table(scored: Scored) -> str:
    """Plain text of at most 80 columns."""
    lines = [
        scored.metric_name,
        f"{one_line(scored.data)}, split {one_line(scored.split)}: {scored.images} images, "
        f"{scored.objects} objects, {scored.detections} detections",
        *(one_line(f"Note: {note}") for note in scored.notes),
        "",
    ]
    columns = list(next(iter(scored.per_class.values())))
    shown = columns[:5]
    lines.append(f"{'':<28}" + "".join(f"{name:>9}" for name in shown))
    for name, row in scored.per_class.items():
        lines.append(f"{one_line(name)[:27]:<28}" + "".join(f"{row[c]:9.2f}" for c in shown))
    lines.append(f"{'mean':<28}" + "".join(f"{scored.metrics[c]:9.2f}" for c in shown))
    rest = [name for name in scored.metrics if name not in shown]
    if rest:
        lines.append("")
        lines += [f"{name:<28}{scored.metrics[name]:9.2f}" for name in rest]
    return "\n".join(lines) + "\n"


def _ignored(truth: Truth) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return truth.difficult if truth.crowd is None else truth.difficult | truth.crowd


def _read_labels(data: str, split: str) -> _Labels:
    path = Path(data)
    trees = find_voc_trees(path)
    if trees:
        source = VocSplit(trees, split, data)
        labels = [source.labels(number) for number in range(len(source.ids))]
        boxes = [of_image.boxes for of_image in labels]
        classes = sorted({box.name for of_image in boxes for box in of_image})
        truths = [_truth(of_image, classes) for of_image in boxes]
        left_out = [reason for of_image in labels for reason in of_image.left_out]
        return _Labels(data, split, source.ids, source.names, classes, truths, left_out)
    if (path / MANIFEST).is_file() or is_yolo(path):
        return _labels_of(data, split)
    if coco_files(path):
        path = coco_split_file(path, split)
    if not path.exists():
        raise UsageError(f"{data}: this file or folder does not exist.")
    if path.suffix != ".json":
        raise UsageError(
            f"{data}: this is neither a VOC tree, nor a YOLO set, nor labelled shards, nor COCO's "
            f"JSON (annotations/instances_{split}.json in a folder, or the file itself)."
        )
    content = read_json(path)
    usable: dict[str, Any] = {}
    coco = parse_coco(content, path, usable)
    classes = coco.classes
    return _Labels(
        data,
        path.stem,
        [image.file_name for image in coco.images],
        [Path(image.file_name).stem for image in coco.images],
        classes,
        [_truth(image.objects, classes) for image in coco.images],
        coco.all_left_out,
        {**content, **usable},
        coco,
    )


def _labels_of(data: str, split: str) -> _Labels:
    """The labels of a set that is read with its images: in shards, or in YOLO's fractions."""
    notes = _Notes()
    labelled = open_labelled(data, [split], notes)
    classes = labelled.classes
    return _Labels(
        data,
        split,
        labelled.ids,
        [Path(image_id).stem for image_id in labelled.ids],
        classes,
        [labelled.truth(position, classes) for position in range(len(labelled))],
        notes.warnings,
    )


class _Notes(SilentReporter):
    """Keeps the warnings about labels that cannot be used."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def _restrict_to_tested(file: Path, labels: _Labels) -> tuple[_Labels, list[str]]:
    """Restrict the labels to the images tested by the evaluation that wrote `file`; add notes.

    An evaluation with `--limit` tests the first images of its split; scoring its detections against
    all images would count the objects of the others as missed.
    Raises UsageError when the tested images cannot be found among these.
    """
    results = file.resolve().parents[2] / RESULTS
    if not (file.parent.name.startswith("seed-") and results.is_file()):
        return labels, []
    tested, count = Results.read(results).test, len(labels.ids)
    if tested.image_ids_sha256 == image_ids_digest(labels.ids):
        return labels, []
    first = slice(tested.images)
    if tested.images > count or tested.image_ids_sha256 != image_ids_digest(labels.ids[first]):
        raise UsageError(
            f"{file}: its evaluation tested {tested.images} images of {tested.address}, split "
            f"{tested.split}, which are not the first of the {count} in {labels.data}, split "
            f"{labels.split}. Give the data and split of the evaluation."
        )
    restricted = replace(
        labels, ids=labels.ids[first], names=labels.names[first], truths=labels.truths[first]
    )
    note = (
        f"the evaluation tested the first {tested.images} of the {count} images only; the others "
        f"are not scored"
    )
    return restricted, [note]


def _truth(boxes: Iterable[Box], classes: Sequence[str]) -> Truth:
    boxes = list(boxes)
    corners = np.array([box.corners for box in boxes], dtype=np.float64).reshape(-1, 4)
    sides = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    areas = [box.details.get("area", side) for box, side in zip(boxes, sides, strict=True)]
    return Truth(
        corners,
        np.array([classes.index(box.name) for box in boxes], dtype=np.int64),
        np.array([box.difficult for box in boxes], dtype=np.bool_),
        np.array([box.crowd for box in boxes], dtype=np.bool_),
        np.array(areas, dtype=np.float64),
    )


@dataclass(frozen=True)
class _Row:
    box: tuple[float, float, float, float]
    label: int
    score: float


def _by_image(rows: Sequence[tuple[int, _Row]], images: int) -> list[Detections]:
    """rows: image number and detection, in the order of the files."""
    by_image: list[list[tuple[int, _Row]]] = [[] for _ in range(images)]
    for place, (image, row) in enumerate(rows):
        by_image[image].append((place, row))
    return [
        Detections(
            np.array([row.box for _, row in found], dtype=np.float64).reshape(-1, 4),
            np.array([row.label for _, row in found], dtype=np.int64),
            np.array([row.score for _, row in found], dtype=np.float64),
            order=np.array([place for place, _ in found], dtype=np.int64),
        )
        for found in by_image
    ]


def _from_text(files: Sequence[Path], labels: _Labels) -> list[Detections]:
    images = {name: number for number, name in enumerate(labels.names)}
    if len(images) < len(labels.names):
        raise UsageError(
            f"{labels.data}: two images have the same name; text files cannot distinguish them."
        )
    rows: list[tuple[int, _Row]] = []
    seen: dict[int, Path] = {}
    for file in files:
        label = _class_of(file, labels)
        if label in seen:
            raise UsageError(f"{file} and {seen[label]} both hold class {labels.classes[label]}.")
        seen[label] = file
        for number, line in enumerate(read_text(file).splitlines(), 1):
            where = f"{file}, line {number}"
            parts = line.split()
            if not parts:
                continue
            values = _numbers(parts[1:], where, line)
            if parts[0] not in images:
                raise UsageError(
                    f"{where}: {labels.data}, split {labels.split}, has no image {parts[0]!r}."
                )
            confidence, x_min, y_min, x_max, y_max = values
            box = (x_min - 1, y_min - 1, x_max, y_max)
            rows.append((images[parts[0]], _Row(box, label, confidence)))
    return _by_image(rows, len(labels.names))


def _class_of(file: Path, labels: _Labels) -> int:
    """The longest class name that ends the file name after `_`; class names may contain `_`."""
    fitting = [c for c in labels.classes if file.stem == c or file.stem.endswith(f"_{c}")]
    if file.suffix != ".txt" or not fitting:
        raise UsageError(
            f"{file}: name the file as the development kit does, *_<class>.txt; the classes of "
            f"{labels.data} are {', '.join(labels.classes)}."
        )
    return labels.classes.index(max(fitting, key=len))


def _numbers(parts: Sequence[str], where: str, line: str) -> list[float]:
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != 5 or not all(map(math.isfinite, values)):
        raise UsageError(
            f"{where}: the line is {line.strip()!r}; expected `image score xmin ymin xmax ymax`."
        )
    return values


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        content = parse_json(file.read_bytes())  # of any size
    except (OSError, ParseError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return content
    raise UsageError(f"{file}: expected a list of detections, as in COCO's results.")


def _from_results(
    content: Sequence[Mapping[str, Any]], file: Path, labels: _Labels
) -> list[Detections]:
    if labels.content is None or labels.coco is None:
        raise UsageError(
            f"{file}: COCO's results refer to images and categories by the ids in COCO's JSON; "
            f"give that JSON as --data."
        )
    images = {image.id: number for number, image in enumerate(labels.coco.images)}
    sizes = {
        image["id"]: [image.get(side) for side in _SIDES] for image in labels.content["images"]
    }
    classes = {
        category: labels.classes.index(name) for category, name in labels.coco.categories.items()
    }
    rows = []
    for number, row in enumerate(content, 1):
        where = f"{file}: detection {number}"
        for key, known in (("image_id", images), ("category_id", classes)):
            if not isinstance(row.get(key), int | str) or row[key] not in known:
                raise UsageError(
                    f"{where}: its {key} is {row.get(key)!r}, which is not in {labels.data}."
                )
        if "segmentation" in row:
            _check_mask(row["segmentation"], sizes[row["image_id"]], where)
        if ("bbox" in row) != ("bbox" in content[0]):
            raise UsageError(f"{file}: some detections have a bbox and some do not; give all one.")
        x, y, width, height = coco_box(_box_of(row), where)
        box = (x, y, x + width, y + height)
        rows.append(
            (images[row["image_id"]], _Row(box, classes[row["category_id"]], _score(row, where)))
        )
    return _by_image(rows, len(labels.ids))


def _check_mask(mask: object, size: list[object], where: str) -> None:
    """size: height and width of the image, None if the data does not state it."""
    if not isinstance(mask, Mapping) or not isinstance(mask.get("counts"), str):
        raise UsageError(
            f"{where}: its segmentation is not a mask in COCO's result format, "
            f'{{"size": [height, width], "counts": "..."}}, compressed by pycocotools.mask.encode.'
        )
    if mask.get("size") != size and None not in size:
        raise UsageError(
            f"{where}: its mask is for an image of {mask.get('size')} (height, width), but the "
            f"image is {size}; scale masks to the image."
        )


def _box_of(row: Mapping[str, Any]) -> object:
    """Mask results may omit the box; it then follows from the mask."""
    if "bbox" in row or not isinstance(row.get("segmentation"), Mapping):
        return row.get("bbox")
    return coco_mask.toBbox(row["segmentation"]).tolist()


def _score(row: Mapping[str, Any], where: str) -> float:
    value = row.get("score")
    if isinstance(value, bool) or not is_number(value):
        raise UsageError(f"{where}: its score is {value!r}; expected a number.")
    return float(value)


def _from_rows(content: list[dict[str, Any]], file: Path, labels: _Labels) -> list[Detections]:
    images, classes = set(labels.ids), set(labels.classes)
    for number, row in enumerate(content, 1):
        where = f"{file}: detection {number}"
        for key, known in (("image_id", images), ("name", classes)):
            if not isinstance(row.get(key), str) or row[key] not in known:
                raise UsageError(
                    f"{where}: its {key} is {row.get(key)!r}, which is not in {labels.data}, "
                    f"split {labels.split}."
                )
        _score(row, where)
        box = row.get("box")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise UsageError(
                f"{where}: its box is {box!r}; expected four numbers: x_min, y_min, x_max, y_max."
            )
    return detections_from_rows(cast("list[DetectionRow]", content), labels.ids, labels.classes)


def _notes(labels: _Labels, found: Sequence[Detections]) -> list[str]:
    having = np.zeros(len(labels.classes), dtype=np.bool_)
    for of_image in found:
        having[of_image.labels] = True
    without = [name for name, has in zip(labels.classes, having, strict=True) if not has]
    notes = [f"no detections for {', '.join(without)}"] if without else []
    blank = sum(not len(of_image.labels) for of_image in found)
    if blank:
        notes.insert(
            0, f"{blank} of the {len(found)} images have no detection; their objects are missed"
        )
    if labels.left_out:
        notes.append(
            f"{len(labels.left_out)} annotations were left out; the first is {labels.left_out[0]}"
        )
    empty = sum(int((d.boxes[:, 2:] <= d.boxes[:, :2]).any(axis=1).sum()) for d in found)
    if empty:
        notes.append(f"{empty} detections have a box without area, which no object overlaps")
    return notes
