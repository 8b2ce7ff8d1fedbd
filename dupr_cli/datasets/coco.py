"""COCO's JSON, read: images, categories, and the objects of each image.

    coco = read_coco(Path("annotations/instances_val2017.json"))
    coco.classes                # names of the categories, in order of their ids
    coco.images[0].file_name    # images in the order of the file
    coco.images[0].objects      # tuple of `labels.Box`: pixel edges, crowd; details["area"],
                                # ["segmentation"], ["id"] and whatever else COCO says of it
    image_folder(coco)          # where the images lie, None when they are in no usual place

COCO's box is x, y, width, height; here it is x, y, x + width, y + height. Boxes without area, or of
negative width or height, are kept as they are: what to do with them is the caller's choice.

Sources: the COCO data format (cocodataset.org, Data format), the layout of COCO 2017.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from dupr_cli.artifacts.labels import Box
from dupr_cli.errors import UsageError

ImageId = int | str

_INSTANCES, _KEYPOINTS = "instances_", "person_keypoints_"
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class CocoImage:
    """One image and its objects. width, height: pixels, None where the file does not say."""

    id: ImageId
    file_name: str
    width: int | None
    height: int | None
    objects: tuple[Box, ...]


@dataclass(frozen=True)
class CocoSet:
    """One JSON file. categories: names by id, in order of ids; empty where nothing is labelled."""

    file: Path
    categories: dict[int, str]
    images: tuple[CocoImage, ...]

    @property
    def classes(self) -> list[str]:
        return list(self.categories.values())


def read_coco(file: Path) -> CocoSet:
    """The file as a whole.

    Raises UsageError, naming the file and the annotation's id, for what is not as COCO has it:
    JSON that cannot be read, categories or images without an id or twice under one, annotations of
    an unknown category or image, boxes and segmentations that are none.
    """
    return parse_coco(read_json(file), file)


def parse_coco(content: Mapping[str, Any], file: Path) -> CocoSet:
    """The same of a file's content; `file` is for messages. See `read_coco`."""
    try:
        categories = {c["id"]: str(c["name"]) for c in content.get("categories") or []}
        categories = dict(sorted(categories.items()))
        images = {image["id"]: image for image in content["images"]}
        if len(categories) < len(content.get("categories") or []):
            raise UsageError(f"{file}: two categories have the same id; give each its own.")
        if len(images) < len(content["images"]):
            raise UsageError(f"{file}: two images have the same id; give each its own.")
        objects: dict[ImageId, list[Box]] = defaultdict(list)
        for number, annotation in enumerate(content.get("annotations") or []):
            where = f"{file}: annotation {annotation.get('id', f'number {number + 1}')}"
            image = annotation.get("image_id")
            if image not in images:
                raise UsageError(
                    f"{where}: its image_id is {image!r}, but no image of the file has that id."
                )
            objects[image].append(_box(annotation, categories, where))
        return CocoSet(file, categories, tuple(_image(i, objects) for i in images.values()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{file}: not as COCO writes it: {type(error).__name__}: {error}."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file, not looked into. Raises UsageError when it is no COCO JSON at all."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or "images" not in content:
        raise UsageError(f"{file}: COCO's JSON is an object with images, annotations, categories.")
    return content


def _image(image: Mapping[str, Any], objects: Mapping[ImageId, list[Box]]) -> CocoImage:
    return CocoImage(
        image["id"],
        str(image["file_name"]),
        image.get("width"),
        image.get("height"),
        tuple(objects.get(image["id"], ())),
    )


def _box(annotation: Mapping[str, Any], categories: Mapping[int, str], where: str) -> Box:
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in categories:
        raise UsageError(
            f"{where}: its category_id is {category!r}; the file's categories are "
            f"{', '.join(map(str, categories)) or 'none'}."
        )
    x, y, width, height = coco_box(annotation.get("bbox"), where)
    check_segmentation(annotation.get("segmentation", []), where)
    area = annotation.get("area", 0)
    if not is_number(area):
        raise UsageError(f"{where}: its area is {area!r}, but a number is needed.")
    own = ("bbox", "image_id", "category_id", "iscrowd")
    return Box(
        categories[category], x, y, x + width, y + height,
        crowd=bool(annotation.get("iscrowd", 0)),
        details={name: value for name, value in annotation.items() if name not in own},
    )  # fmt: skip


def coco_box(value: object, where: str) -> tuple[float, float, float, float]:
    """x, y, width, height. Raises UsageError, beginning with `where`, for anything else."""
    if isinstance(value, list) and len(value) == 4 and all(map(is_number, value)):
        return value[0], value[1], value[2], value[3]
    raise UsageError(
        f"{where}: its bbox is {value!r}; four numbers are needed: x, y, width, height."
    )


def check_segmentation(value: object, where: str) -> None:
    """Raises UsageError, beginning with `where`, unless these are polygons or a run-length mask."""
    if isinstance(value, Mapping):
        size = value.get("size")
        sides = isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) for s in size)
        if sides and isinstance(value.get("counts"), str | list):
            return
    elif isinstance(value, list) and all(isinstance(p, list) and len(p) % 2 == 0 for p in value):
        return
    raise UsageError(
        f"{where}: its segmentation is neither polygons [[x, y, x, y, ...], ...] nor a mask "
        f'{{"size": [height, width], "counts": ...}}.'
    )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def with_keypoints(coco: CocoSet) -> CocoSet:
    """Objects with the keypoints that COCO keeps in a file of their own, if it lies beside."""
    beside = coco.file.with_name(coco.file.name.replace(_INSTANCES, _KEYPOINTS))
    if beside == coco.file or not beside.is_file():
        return coco
    try:
        keypoints = {
            annotation["id"]: {name: annotation[name] for name in ("keypoints", "num_keypoints")}
            for annotation in read_json(beside)["annotations"]
        }
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{beside}: not as COCO writes it: {type(error).__name__}: {error}."
        ) from error

    def completed(box: Box) -> Box:
        return replace(box, details={**box.details, **keypoints.get(box.details.get("id"), {})})

    images = (replace(i, objects=tuple(map(completed, i.objects))) for i in coco.images)
    return replace(coco, images=tuple(images))


def coco_files(folder: Path) -> list[Path]:
    """annotations/instances_*.json of a COCO folder, by name; none where it is no such folder."""
    return sorted((folder / "annotations").glob(f"{_INSTANCES}*.json"))


def coco_split(file: Path) -> str:
    """train of instances_train2017.json; the file's own name where it says nothing."""
    name = _plain_name(file)
    return next((split for split in _SPLITS if name.startswith(split)), name)


def coco_root(file: Path) -> Path:
    """The folder that holds annotations/ and the images; the file's own where there is none."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def image_folders(file: Path) -> list[Path]:
    """The usual places of a file's images."""
    root, year = coco_root(file), _plain_name(file)
    return [root / year, root / "images" / year, root / "images", root, file.parent]


def image_folder(coco: CocoSet, places: Sequence[Path] | None = None) -> Path | None:
    """The first place, of the usual ones by default, that has the first image; None where none."""
    for place in places or image_folders(coco.file):
        if not coco.images or (place / coco.images[0].file_name).is_file():
            return place
    return None


def _plain_name(file: Path) -> str:
    return file.stem.removeprefix(_INSTANCES).removeprefix(_KEYPOINTS)
