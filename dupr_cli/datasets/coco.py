"""Reads COCO's JSON: images, categories, and the objects of each image.

    coco = read_coco(Path("annotations/instances_val2017.json"))
    coco.classes                # names of the categories, in order of their ids
    coco.images[0].file_name    # images in the order of the file
    coco.images[0].objects      # tuple of `labels.Box`: pixel edges, crowd; details["area"],
                                # ["segmentation"], ["id"] and any other field of COCO
    coco.left_out               # rows that cannot be used, and why
    image_folder(coco)          # folder of the images, None if they are in no usual place

COCO's box is x, y, width, height; here it is x, y, x + width, y + height. Boxes without area are
kept; the caller decides what to do with them. Ids and numbers may be written as text, null counts
as a missing value, and a bad row loses only that row.

Sources: the COCO data format (cocodataset.org, Data format), the layout of COCO 2017, and the
exports of Roboflow (train/_annotations.coco.json), FiftyOne (labels.json, data/), Label Studio
(result.json, images/) and CVAT (annotations/instances_default.json).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeGuard
from urllib.parse import unquote

from dupr_cli.artifacts.files import is_present, named
from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.layout import split_folders, split_named
from dupr_cli.datasets.placement import Labels
from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, parse_json

ImageId = int | str

_INSTANCES, _KEYPOINTS = "instances_", "person_keypoints_"
_OTHERS = (_KEYPOINTS, "captions_", "panoptic_", "stuff_", "image_info_")
# Names that tools give the JSON of a folder; they do not name a split.
_BESIDE = ("_annotations.coco.json", "labels.json", "result.json")
# Number of images that are looked for to find the folder of all images.
_PROBED_IMAGES = 50
_PEEK_BYTES = 1 << 16


@dataclass(frozen=True)
class CocoImage:
    """One image and its objects. width, height: pixels, None if the file does not give them.

    left_out, remarks: as in `Labels`.
    """

    id: ImageId
    file_name: str
    width: int | None
    height: int | None
    objects: tuple[Box, ...]
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def labels(self) -> Labels:
        size = (self.width, self.height) if self.width and self.height else None
        return Labels(self.objects, size, left_out=self.left_out, remarks=self.remarks)


@dataclass(frozen=True)
class CocoSet:
    """One JSON file. categories: names by id, in order of ids; empty if nothing is labelled.

    left_out: unusable rows that belong to none of the images, and why.
    """

    file: Path
    categories: dict[ImageId, str]
    images: tuple[CocoImage, ...]
    left_out: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names without repetition: some tools give several categories the same name."""
        return list(dict.fromkeys(self.categories.values()))

    @property
    def all_left_out(self) -> list[str]:
        return [*self.left_out, *(reason for image in self.images for reason in image.left_out)]

    @property
    def notes(self) -> list[str]:
        """Notes on the file as a whole for the user."""
        if not self.left_out:
            return []
        return [
            f"{self.file}: {len(self.left_out)} rows belong to no image and were left out; the "
            f"first: {self.left_out[0]}"
        ]


def read_coco(file: Path) -> CocoSet:
    """Read a whole file.

    Raises UsageError that names the file if it cannot be read or is not COCO's JSON. Rows that
    cannot be used are left out, each with its reason.
    """
    return parse_coco(read_json(file), file)


def parse_coco(
    content: Mapping[str, Any], file: Path, usable: dict[str, list[dict[str, Any]]] | None = None
) -> CocoSet:
    """Like `read_coco`, for content that has been read; `file` is for messages.

    usable: filled with the usable rows, with ids and numbers as COCO writes them and categories of
    one name merged into one.
    """
    left_out: list[str] = []
    categories = _Rows(_listed(content, "categories", file), "category", "name", left_out)
    by_id = sorted(categories.found.items(), key=lambda item: _order(item[0]))
    names = {category: str(row["name"]) for category, row in by_id}
    listed = _listed(content, "images", file)
    images = _Rows(listed, "image", "file_name", left_out)
    if listed and not images.found:
        raise UsageError(
            f"{file}: none of {len(listed)} images can be used; for example {left_out[-1]}."
        )
    first = {name: category for category, name in reversed(names.items())}
    rows: list[dict[str, Any]] = []
    objects: dict[ImageId, list[Box]] = defaultdict(list)
    reasons: dict[ImageId, list[str]] = defaultdict(list)
    remarks: dict[ImageId, list[str]] = defaultdict(list)
    for number, annotation in enumerate(_listed(content, "annotations", file), 1):
        if not isinstance(annotation, dict):
            left_out.append(f"annotation number {number}: an object is needed, not {annotation!r}")
            continue
        where = f"annotation {annotation.get('id', f'number {number}')}"
        image = images.known(annotation.get("image_id"))
        if image is None:
            left_out.append(
                f"{where}: its image_id is {annotation.get('image_id')!r}, but no image of the "
                f"file has that id"
            )
            continue
        try:
            category = categories.known(annotation.get("category_id"))
            if category is None:
                raise UsageError(
                    f"{where}: its category_id is {annotation.get('category_id')!r}; the file's "
                    f"categories are {', '.join(map(str, names)) or 'none'}"
                )
            row = images.found[image]
            box, lost = _box(
                annotation, names[category], (row.get("height"), row.get("width")), where
            )
            objects[image].append(box)
            remarks[image] += lost
            if usable is not None:
                rows.append(_as_coco(annotation, image, first[box.name], box))
        except UsageError as error:
            reasons[image].append(str(error))
    if usable is not None:
        usable["annotations"], usable["images"] = rows, list(images.found.values())
        usable["categories"] = [
            {**categories.found[category], "name": name} for name, category in first.items()
        ]
    return CocoSet(
        file,
        names,
        tuple(
            CocoImage(
                image, str(row["file_name"]), _side(row.get("width")), _side(row.get("height")),
                tuple(objects.get(image, ())), tuple(reasons.get(image, ())),
                tuple(remarks.get(image, ())),
            )
            for image, row in images.found.items()
        ),
        tuple(left_out),
    )  # fmt: skip


class _Rows:
    """Images or categories by id. Annotations may write a number as text, or the reverse."""

    def __init__(self, rows: list[Any], what: str, needed: str, left_out: list[str]) -> None:
        self.found: dict[ImageId, dict[str, Any]] = {}
        twice: set[ImageId] = set()
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not _is_id(row.get("id")) or not _filled(row, needed):
                left_out.append(f"{what} number {number}: an id and a {needed} are needed")
                continue
            if row["id"] in self.found and self.found[row["id"]] != row:
                twice.add(row["id"])
            self.found.setdefault(row["id"], row)
        for one in twice:
            # The annotations do not say which of the two they mean.
            del self.found[one]
            left_out.append(f"{what} {one}: another {what} has the same id; give each its own")
        texts = Counter(map(_id_text, self.found))
        self._by_text = {_id_text(i): i for i in self.found if texts[_id_text(i)] == 1}

    def known(self, value: object) -> ImageId | None:
        """The known id that equals `value` as text; None if it matches none."""
        if not _is_id(value):
            return None
        return value if value in self.found else self._by_text.get(_id_text(value))


def _is_id(value: object) -> TypeGuard[ImageId]:
    whole = isinstance(value, float) and value.is_integer()
    return (isinstance(value, int | str) and not isinstance(value, bool)) or whole


def _id_text(value: ImageId) -> str:
    return str(int(value) if isinstance(value, float) else value).strip()


def _filled(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None and str(row[name]).strip() != ""


def _order(value: ImageId) -> tuple[float, str]:
    text = _id_text(value)
    return (int(text), "") if text.isascii() and text.isdigit() else (math.inf, text)


def _listed(content: Mapping[str, Any], name: str, file: Path) -> list[Any]:
    value = content.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{file}: not COCO's format: `{name}` is not a list.")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file, unchecked. Raises UsageError if it is not COCO's JSON at all."""
    try:
        # COCO's own files have half a gigabyte; only what is in them can be too much.
        content = parse_json(file.read_bytes())
    except (OSError, ParseError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or "images" not in content:
        raise UsageError(
            f"{file}: not COCO's JSON, which is an object with images, annotations, categories."
        )
    return content


def _side(value: object) -> int | None:
    number = _as_number(value)
    return int(number) if is_number(number) and number >= 1 else None


def _as_number(value: object) -> object:
    """`value`, converted to a number if it is a number written as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _box(
    annotation: Mapping[str, Any], name: str, sides: tuple[Any, Any], where: str
) -> tuple[Box, list[str]]:
    """An object, and remarks on fields left out. Raises UsageError if it cannot be used."""
    bbox = annotation.get("bbox")
    x, y, width, height = coco_box(
        [_as_number(v) for v in bbox] if isinstance(bbox, list) else bbox, where
    )
    if width < 0 or height < 0:
        raise UsageError(f"{where}: its bbox is {bbox!r}, with a negative width or height")
    own = ("bbox", "image_id", "category_id", "iscrowd")
    details = {k: v for k, v in annotation.items() if k not in own and v is not None}
    if "area" in details:
        details["area"] = _as_number(details["area"])
        if not is_number(details["area"]):
            raise UsageError(f"{where}: its area is {annotation['area']!r}, but a number is needed")
    remarks = []
    if "segmentation" in details:
        try:
            details["segmentation"] = _segmentation(details["segmentation"], sides, where)
        except UsageError as error:
            remarks.append(f"mask left out: {error}")
            details["segmentation"] = None
        if not details["segmentation"]:
            del details["segmentation"]
    points = details.get("keypoints")
    if points is not None and not (
        isinstance(points, list) and len(points) % 3 == 0 and all(map(is_number, points))
    ):
        remarks.append(f"keypoints left out: {where}: x, y, visibility of each point are needed")
        del details["keypoints"]
    box = Box(
        name, x, y, x + width, y + height, crowd=_crowd(annotation.get("iscrowd"), where),
        details=details,
    )  # fmt: skip
    return box, remarks


def _as_coco(
    annotation: Mapping[str, Any], image: ImageId, category: ImageId, box: Box
) -> dict[str, Any]:
    row = {name: value for name, value in annotation.items() if name in ("id", *box.details)}
    return {
        **row,
        **box.details,
        "image_id": image,
        "category_id": category,
        "bbox": [_as_number(value) for value in annotation["bbox"]],
        "iscrowd": int(box.crowd),
    }


def _crowd(value: object, where: str) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if value is None or text in ("0", "0.0", "false", ""):
        return False
    raise UsageError(f"{where}: its iscrowd is {value!r}; 0 or 1 is needed")


def coco_box(value: object, where: str) -> tuple[float, float, float, float]:
    """x, y, width, height. Raises UsageError, beginning with `where`, for anything else."""
    if isinstance(value, list) and len(value) == 4 and all(map(is_number, value)):
        return value[0], value[1], value[2], value[3]
    raise UsageError(
        f"{where}: its bbox is {value!r}; four numbers are needed: x, y, width, height"
    )


def _segmentation(value: object, sides: tuple[Any, Any], where: str) -> object:
    """Polygons or a run-length mask. sides: height and width of the image, None if unknown.

    Raises UsageError, beginning with `where`, for anything else.
    """
    if isinstance(value, Mapping):
        size, counts = value.get("size"), value.get("counts")
        known = [_side(side) for side in sides]
        if not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) for s in size)
        ):
            pass
        elif None not in known and size != known:
            raise UsageError(
                f"{where}: its mask has {size} pixels (height x width), but the image has {known}"
            )
        elif isinstance(counts, str):
            return value
        elif isinstance(counts, list) and all(isinstance(c, int) and c >= 0 for c in counts):
            if sum(counts) == size[0] * size[1]:
                return value
            raise UsageError(f"{where}: its mask has {sum(counts)} pixels, but its size is {size}")
    elif isinstance(value, list):
        # Some tools write a single polygon without the outer list.
        flat = len(value) >= 6 and all(map(is_number, value))
        polygons = [value] if flat else value
        if all(
            isinstance(p, list) and len(p) % 2 == 0 and all(map(is_number, p)) for p in polygons
        ):
            return polygons
    raise UsageError(
        f"{where}: its segmentation is neither polygons [[x, y, x, y, ...], ...] nor a mask "
        f'{{"size": [height, width], "counts": ...}}'
    )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite number."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def with_keypoints(coco: CocoSet) -> CocoSet:
    """Add the keypoints that COCO keeps in a separate file, if that lies beside this one."""
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
            f"{beside}: not COCO's format: {type(error).__name__}: {error}."
        ) from error

    def completed(box: Box) -> Box:
        return replace(box, details={**box.details, **keypoints.get(box.details.get("id"), {})})

    images = (replace(i, objects=tuple(map(completed, i.objects))) for i in coco.images)
    return replace(coco, images=tuple(images))


def coco_files(folder: Path) -> list[Path]:
    """The JSON of each split of a COCO folder; empty if it is not such a folder."""
    if not folder.is_dir():
        return []
    listed = [file for file in _json_files(folder / "annotations") if _looks_like_coco(file)]
    if listed:
        return listed
    places = [folder, *split_folders(folder)]
    beside = [p / name for p in places for name in _BESIDE if (p / name).is_file()]
    found = [file for file in beside if _looks_like_coco(file)]
    return found or [file for file in _json_files(folder) if _looks_like_coco(file)]


def _json_files(folder: Path) -> list[Path]:
    """The JSON files of a folder, without COCO's keypoints, captions and the like."""
    if not folder.is_dir():
        return []
    files = named(folder, lambda name: name.lower().endswith(".json") and name[0] != ".")
    # Opening a named pipe would wait for ever.
    return [file for file in files if not file.name.startswith(_OTHERS) and file.is_file()]


def _looks_like_coco(file: Path) -> bool:
    """Whether the names of COCO's lists occur near the start or the end of a file."""
    if file.name.startswith(_INSTANCES):
        return True
    with file.open("rb") as opened:
        start = opened.read(_PEEK_BYTES)
        opened.seek(max(0, file.stat().st_size - _PEEK_BYTES))
        text = (start + opened.read()).replace(b"\0", b"")
    return b'"images"' in text and any(
        name in text for name in (b'"annotations"', b'"categories"', b'"image_id"')
    )


def coco_split(file: Path) -> str:
    """The split of a file: train for instances_train2017.json and train/labels.json, val for
    valid/...; otherwise the file's own name, or train if a tool gives every file that name."""
    name = _plain_name(file)
    if file.name in _BESIDE:
        return split_named(file.parent.name) or "train"
    return split_named(name) or name


def find_split(files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split: `train2017` is the file of that name, `train` any train split."""
    exact = [f for f in files if split in (f.stem, _plain_name(f))]
    return exact or [file for file in files if coco_split(file) in (split, split_named(split))]


def coco_split_file(root: Path, split: str) -> Path:
    """The JSON of a split: `train2017`, or `train` if only one file is of a train split.

    Raises UsageError for an unknown split, or one that several files match.
    """
    files = coco_files(root)
    found = find_split(files, split)
    if len(found) != 1:
        known = (coco_split(f) if f.name in _BESIDE else _plain_name(f) for f in files)
        raise UsageError(
            f"{root}: {'several files match' if found else 'no file is'} the split {split!r} "
            f"(annotations/instances_{split}.json or annotations/{split}.json); its splits are "
            f"{', '.join(known)}."
        )
    return found[0]


def coco_root(file: Path) -> Path:
    """The folder that holds annotations/ and the images; without annotations/, the file's own."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def image_folders(file: Path) -> list[Path]:
    """The usual places of a file's images."""
    root, year = coco_root(file), _plain_name(file)
    names = [year, f"images/{year}", "images", "data", "."]
    return list(dict.fromkeys([*(root / name for name in names), file.parent]))


def image_folder(coco: CocoSet, places: Sequence[Path] | None = None) -> Path | None:
    """The first of `places` (by default the usual ones) that has one of the first images, or
    None."""
    for place in places or image_folders(coco.file):
        some = coco.images[:_PROBED_IMAGES]
        if not coco.images or any(is_present(image_path(place, i.file_name)) for i in some):
            return place
    return None


def image_path(folder: Path, file_name: str) -> Path:
    """The file of an image in a folder: by the name as written, otherwise by a name in the style of
    another system or a label server. The file need not exist."""
    path = folder / file_name
    if is_present(path):
        return path
    plain = unquote(file_name.replace("\\", "/")).rpartition(":")[2]
    parts = [part for part in PurePosixPath(plain).parts if part not in ("/", "..")]
    tails = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if is_present(tail)), path)


def _plain_name(file: Path) -> str:
    return file.stem.removeprefix(_INSTANCES).removeprefix(_KEYPOINTS)


class CocoSplit:
    """Images of one JSON of COCO: `train2017` is annotations/instances_train2017.json.

    `train` also names it if annotations/ has no other train split. Images are identified by their
    file names, because many tools start ids from 1 in every file.
    """

    def __init__(self, root: Path, split: str, keypoints: bool = False) -> None:
        """keypoints: read also those of person_keypoints_*.json beside instances_*.json."""
        file = root if root.is_file() else coco_split_file(root, split)
        coco = read_coco(file)
        if keypoints:
            coco = with_keypoints(coco)
        places = [*([] if root.is_file() else [root / split]), *image_folders(file)]
        folder = image_folder(coco, places)
        if folder is None:
            tried = ", ".join(str(place) for place in dict.fromkeys(places))
            raise UsageError(
                f"{file}: its first image, {coco.images[0].file_name}, is in none of {tried}. "
                f"Put the images into one of them."
            )
        self._folder, self._images = folder, coco.images
        # Roboflow's folders may each have an image of the same name.
        of_split = file.name in _BESIDE and split_named(file.parent.name) and not root.is_file()
        above = f"{file.parent.name}/" if of_split else ""
        self.ids = [above + image.file_name for image in coco.images]
        self.notes = coco.notes

    def place(self, number: int) -> str:
        return str(image_path(self._folder, self._images[number].file_name))

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def labels(self, number: int) -> Labels:
        return self._images[number].labels
