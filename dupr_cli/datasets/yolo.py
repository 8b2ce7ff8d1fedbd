"""Reads YOLO's labels: a text file per image and a line per object, in fractions of the image.

    class x_center y_center width height                     detection; a confidence may follow
    class x1 y1 x2 y2 x3 y3 ...                              a polygon, or an oriented box
    class x_center y_center width height x y [v] x y [v] ... pose, if data.yaml has kpt_shape

Images are found as Ultralytics finds them (data.yaml, images/ and labels/ side by side). The
layouts of Roboflow (train/, valid/, test/), of CVAT's YOLO 1.1 (obj.data) and of LabelImg (labels
and classes.txt beside the images) are also recognised. Ultralytics turns images upright by EXIF
before it uses the labels, and so does this reader.
Sources: ultralytics.data.utils (check_det_dataset, img2label_paths, verify_image_label).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from dupr_cli.artifacts.files import is_image_name, is_possible_path, named
from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.layout import SPLITS, split_folders, split_named, walk
from dupr_cli.datasets.placement import Labels
from dupr_cli.datasets.text import read_text
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import ParseError, parse_yaml, read_limited

# Ultralytics accepts coordinates this far outside the image as rounding errors.
_SLACK = 0.01
# Sets of more do not exist; the names that are missing from so many would fill the memory.
_MOST_CLASSES = 100_000
_PROBED_IMAGES = 20


def is_yolo(path: Path) -> bool:
    """Whether a path is a data.yaml, or a folder in the layout of one of the tools."""
    if path.is_file():
        return path.suffix.lower() in (".yaml", ".yml")
    return path.is_dir() and (_data_file(path) is not None or bool(_plain_splits(path)))


class YoloSet:
    """A YOLO set at a data.yaml or a folder. exclude: a folder that is not part of it."""

    def __init__(self, path: Path, exclude: Path | None = None) -> None:
        self.path, self._exclude = path, exclude
        self._folder = path.parent if path.is_file() else path

    @cached_property
    def _data(self) -> Mapping[str, Any]:
        """Raises UsageError when the file is not a data.yaml."""
        file = self.path if self.path.is_file() else _data_file(self.path)
        if file is None:
            return {}
        if file.suffix == ".data":
            pairs = (line.partition("=") for line in read_text(file).splitlines() if "=" in line)
            return {key.strip(): value.strip() for key, _, value in pairs}
        try:
            return dict(cast(Any, parse_yaml(read_text(file))))
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: not a data.yaml of YOLO: {error}.") from error

    @cached_property
    def root(self) -> Path:
        """The folder that the paths in data.yaml are relative to."""
        # `path` is often a folder of another machine.
        given = self._data.get("path")
        folder = self._folder / _plain(str(given)) if given else self._folder
        return folder if folder.is_dir() else self._folder

    @cached_property
    def _names(self) -> tuple[dict[int, str], str]:
        """Class names by number, and the file that has them; both empty without such a file."""
        names = self._data.get("names")
        if isinstance(names, list):
            return {number: str(name) for number, name in enumerate(names)}, "data.yaml"
        if isinstance(names, dict):
            try:
                return {int(number): str(name) for number, name in names.items()}, "data.yaml"
            except (ValueError, TypeError, OverflowError) as error:
                raise UsageError(
                    f"{self.path}: the keys of `names` must be class numbers: {error}."
                ) from error
        count = self._data.get("nc")
        if names is None and isinstance(count, int):
            if not 0 <= count <= _MOST_CLASSES:
                raise UsageError(
                    f"{self.path}: nc is {count}; a number of classes from 0 to {_MOST_CLASSES} "
                    f"is needed."
                )
            return {number: f"class_{number}" for number in range(count)}, "data.yaml"
        places = [
            self._folder / "classes.txt",
            self.root / "classes.txt",
            self._folder / "obj.names",
        ]
        if isinstance(names, str):
            places = [*self._places(names), *places]
        places += [folder / "classes.txt" for folder in _label_folders(self.root)]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return {}, ""
        # The number of a line is the class, as LabelImg reads the file.
        lines = (line.strip() for line in read_text(file).strip().splitlines())
        return {number: name for number, name in enumerate(lines) if name}, file.name

    @property
    def notes(self) -> list[str]:
        """Notes on the set as a whole for the user."""
        names, file = self._names
        highest = min(max(names, default=-1), _MOST_CLASSES)
        gaps = sorted(set(range(highest + 1)) - names.keys())
        if not gaps:
            return []
        return [
            f"{self.path}: {file} has no name for the classes {', '.join(map(str, gaps[:5]))}"
            f"{', ...' * (len(gaps) > 5)}; their labels are left out"
        ]

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Folders, lists and images of each split, as in data.yaml.

        Raises UsageError if data.yaml gives anything else for a split.
        """
        found: dict[str, list[str]] = {}
        for key, value in self._data.items():
            split = split_named(str(key))
            if not value or str(key) not in (*SPLITS, "valid", "validation"):
                continue
            places = value if isinstance(value, list) else [value]
            if not all(isinstance(place, str) for place in places):
                raise UsageError(f"{self.path}: {key} is {value!r}; a path or a list is needed.")
            found.setdefault(split, []).extend(places)
        return found or _plain_splits(self.root)

    def exists(self, split: str) -> bool:
        """Whether any path of a split exists."""
        return any(path.exists() for given in self.splits[split] for path in self._places(given))

    def images(self, split: str) -> Iterator[str]:
        """Paths of the images of a split, relative to the root if they are below it.

        Raises UsageError for an unknown split or a missing path.
        """
        if split not in self.splits:
            raise UsageError(
                f"{self.path} has no split {split}; its splits are {', '.join(self.splits)}."
            )
        for place in self.splits[split]:
            yield from self._images_at(place)

    def _images_at(self, place: str) -> Iterator[str]:
        path = next((p for p in self._places(place) if p.exists()), self.root / place)
        name = self._relative(path)
        if path.is_dir():
            for image in walk(path, self._exclude):
                yield f"{name}/{image}" if name != "." else image
        elif path.is_file() and path.suffix.lower() == ".txt":
            for line in read_text(path).splitlines():
                if line.strip():
                    yield self._relative(self._listed(line.strip(), path.parent))
        elif is_image_name(path.name):
            yield name
        else:
            raise UsageError(
                f"{path}: the folder of images does not exist. Correct data.yaml, or put the "
                f"images there."
            )

    def _relative(self, path: Path) -> str:
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def _places(self, given: str) -> list[Path]:
        """The paths that a path in data.yaml may mean, the likeliest first."""
        plain = _plain(given)
        places = [self.root / plain, self._folder / plain]
        # Roboflow writes ../train/images for train/images; other paths may be of another machine.
        places.append(self.root / plain.removeprefix("../"))
        # A last part such as `images` alone would match too many paths.
        ends = _tails(self.root, plain)
        return places + (ends if Path(plain).suffix else ends[:-1])

    def _listed(self, line: str, folder: Path) -> Path:
        """The image that a line of a list names. Raises UsageError when it names no file."""
        plain = _plain(line)
        if not Path(plain).name:
            raise UsageError(f"{self.path}: the line {line[:60]!r} of a list names no image.")
        if line.startswith("./"):
            places = [folder / plain, self.root / plain]
        else:
            places = [self.root / plain, folder / plain]
        places += _tails(self.root, plain)
        return next((place for place in places if place.is_file()), self.root / plain)

    def path_of(self, image: str) -> Path:
        return self.root / image

    def files(self, image: str) -> list[Path]:
        """The files that an image and its labels are read from; not all need exist."""
        path = self.path_of(image)
        return [path, label_file(path), *self._class_files]

    @cached_property
    def _class_files(self) -> list[Path]:
        """The files that define the classes and the format of the labels."""
        data = self.path if self.path.is_file() else _data_file(self.path)
        names = [
            self._folder / "classes.txt",
            self.root / "classes.txt",
            self._folder / "obj.names",
        ]
        return [path for path in (data, *names) if path is not None and path.is_file()]

    def labels(self, image: str) -> Labels:
        """Labels of an image; an image without a label file has no objects.

        Raises RunError when the file is not text.
        """
        file = label_file(self.path_of(image))
        boxes, left_out, remarks = list[Box](), list[str](), list[str]()
        if not file.is_file():
            remarks.append("no label file: the image is taken as one without objects")
        try:
            lines = read_text(file).splitlines() if file.is_file() else []
        except UsageError as error:
            raise RunError(str(error)) from error
        for number, line in enumerate(lines, 1):
            words = line.split()
            try:
                if words:
                    boxes.append(self._box(words))
            except ValueError as error:
                left_out.append(f"{file}, line {number}: {error}")
                continue
            if len(words) == 6:
                remarks.append(f"confidence not taken: {file}, line {number} has one after its box")
        return Labels(
            tuple(boxes), upright=True, unit=True, left_out=tuple(left_out), remarks=tuple(remarks)
        )

    @cached_property
    def _keypoints(self) -> tuple[int, int] | None:
        """Number of keypoints and of values per keypoint in a pose set; None for other sets."""
        shape = self._data.get("kpt_shape")
        if shape is None:
            return None
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != 2
            or not isinstance(shape[0], int)
            or shape[1] not in (2, 3)
        ):
            raise UsageError(
                f"{self.path}: kpt_shape is {shape!r}; [keypoints, 2] or [keypoints, 3] is needed."
            )
        return int(shape[0]), int(shape[1])

    @cached_property
    def keypoint_flips(self) -> list[int] | None:
        """flip_idx: the number of each keypoint in a mirrored image. Raises UsageError."""
        flips, shape = self._data.get("flip_idx"), self._keypoints
        if flips is None or shape is None:
            return None
        if not isinstance(flips, list) or sorted(map(str, flips)) != sorted(
            map(str, range(shape[0]))
        ):
            raise UsageError(
                f"{self.path}: flip_idx is {flips!r}; each of 0 to {shape[0] - 1} is needed once."
            )
        return [int(number) for number in flips]

    def _box(self, words: list[str]) -> Box:
        """Raises ValueError when the words are not a label."""
        try:
            number, *values = (float(word) for word in words)
        except ValueError as error:
            raise ValueError(f"not a label of YOLO ({error})") from None
        if not all(map(math.isfinite, (number, *values))):
            raise ValueError("not a label of YOLO (a value is not a finite number)")
        name = self._name(number)
        count = len(values)
        points: list[float] = []
        if self._keypoints is not None and count != 4:
            wanted = 4 + self._keypoints[0] * self._keypoints[1]
            if count != wanted:
                raise ValueError(
                    f"{count} numbers after the class, but kpt_shape requires 4 or {wanted}"
                )
            values, points = values[:4], values[4:]
        elif count not in (4, 5) and (count < 6 or count % 2):
            raise ValueError(
                f"{count} numbers after the class; a box has 4, or 5 with a confidence; a polygon "
                f"has an even number from 6 on; keypoints need kpt_shape in data.yaml"
            )
        shares = values[:4] if count == 5 else values
        if not all(-_SLACK <= value <= 1 + _SLACK for value in shares):
            raise ValueError(
                "coordinates outside 0 to 1; fractions of the image are needed, not pixels"
            )
        if len(shares) > 4:
            xs, ys = shares[::2], shares[1::2]
            details: dict[str, object] = {"segmentation": [shares]}
            return Box(name, min(xs), min(ys), max(xs), max(ys), details=details)
        x, y, width, height = shares
        if width < 0 or height < 0:
            raise ValueError("its box has a negative width or height")
        details = {"keypoints": self._as_coco(points)} if points else {}
        return Box(
            name, x - width / 2, y - height / 2, x + width / 2, y + height / 2, details=details
        )

    def _name(self, number: float) -> str:
        names, _ = self._names
        if number != int(number) or number < 0:
            raise ValueError(f"the class is {number:g}; a whole number from 0 is needed")
        if not names:
            return str(int(number))
        if int(number) not in names:
            raise ValueError(f"class {number:g} has no name")
        return names[int(number)]

    def _as_coco(self, points: list[float]) -> list[float]:
        """x, y, visibility of each keypoint; 0, 0 means that it is not labelled."""
        assert self._keypoints is not None
        if self._keypoints[1] == 3:
            return points
        pairs = zip(points[::2], points[1::2], strict=True)
        return [value for x, y in pairs for value in (x, y, 2 if x or y else 0)]


def label_file(image: Path) -> Path:
    """The label file of an image: below labels/ instead of images/, or beside the image."""
    beside, folders = image.with_suffix(".txt"), list(image.parts[:-1])
    if "images" not in folders:
        return beside
    folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    parallel = Path(*folders, beside.name)
    return parallel if parallel.is_file() or not beside.is_file() else beside


def _plain(path: str) -> str:
    """A path in the style of this machine, without backslashes, drive or leading ./.

    Raises UsageError when no file can have it.
    """
    plain = re.sub(r"^[A-Za-z]:", "", path.strip().replace("\\", "/")).removeprefix("./")
    if not is_possible_path(plain):
        raise UsageError(f"{plain[:60]}... in a YOLO set is not a path.")
    return plain


def _tails(root: Path, path: str) -> list[Path]:
    """Ends of a path, the longest first, below the root, for paths of another machine."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return [root.joinpath(*parts[start:]) for start in range(len(parts))]


def _data_file(folder: Path) -> Path | None:
    """data.yaml, obj.data, or the first YAML file of the folder that names classes."""
    for name in ("data.yaml", "data.yml", "obj.data"):
        if (folder / name).is_file():
            return folder / name
    for file in named(folder, lambda name: name.lower().endswith((".yaml", ".yml"))):
        if not file.is_file():  # opening a named pipe would wait for ever
            continue
        try:
            text = read_limited(file)
        except ParseError:  # no list of classes is so large
            continue
        if b"names:" in text and b"train:" in text:
            return file
    return None


def _label_folders(root: Path) -> list[Path]:
    return [root / "labels", *(folder / "labels" for folder in split_folders(root))]


def _plain_splits(root: Path) -> dict[str, list[str]]:
    """Splits of a folder without a data.yaml; empty if it holds no labels of YOLO."""
    splits: dict[str, list[str]] = {}
    if (root / "images").is_dir() and _has_texts(root / "labels"):
        with_names = split_folders(root / "images")
        places = {folder.name for folder in with_names}
        for folder in with_names:
            splits.setdefault(split_named(folder.name), []).append(f"images/{folder.name}")
        others = named(root / "images", lambda name: name not in places and name[0] != ".")
        if not splits or not others:
            return splits or {"train": ["images"]}
        splits.setdefault("train", []).extend(
            f"images/{path.name}" for path in others if path.is_dir() or is_image_name(path.name)
        )
        return splits
    for folder in split_folders(root):
        split = split_named(folder.name)
        if (folder / "images").is_dir() and _has_texts(folder / "labels"):
            splits.setdefault(split, []).append(f"{folder.name}/images")
        elif _has_labels_beside(folder):
            splits.setdefault(split, []).append(folder.name)
    if not splits and _has_labels_beside(root):
        return {"train": ["."]}
    return splits


def _has_texts(folder: Path) -> bool:
    return any(n.lower().endswith(".txt") for _, _, names in os.walk(folder) for n in names)


def _has_labels_beside(folder: Path) -> bool:
    """Whether images have labels of YOLO beside them, and a classes.txt exists."""
    if not any((place / "classes.txt").is_file() for place in (folder, folder.parent)):
        return False
    images = islice(walk(folder), _PROBED_IMAGES)
    return any((folder / image).with_suffix(".txt").is_file() for image in images)


class YoloSplit:
    """Images of one split of a YOLO set."""

    def __init__(self, path: Path, split: str) -> None:
        self._set = YoloSet(path)
        self.ids = list(self._set.images(split_named(split) or split))
        self.notes = self._set.notes

    def place(self, number: int) -> str:
        return str(self._set.path_of(self.ids[number]))

    def image(self, number: int) -> BinaryIO:
        return Path(self.place(number)).open("rb")

    def labels(self, number: int) -> Labels:
        return self._set.labels(self.ids[number])

    @property
    def keypoint_flips(self) -> list[int] | None:
        return self._set.keypoint_flips
