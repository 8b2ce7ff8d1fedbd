"""YOLO's labels: a text file for each image, a line for each object, in shares of the image.

    class x_center y_center width height          class x1 y1 x2 y2 ... (a polygon)

Sources: the data set format of Ultralytics' YOLO (data.yaml, images/ and labels/ side by side). Its
readers turn images upright by EXIF before they use the labels, and so does this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dupr_cli.artifacts.files import named
from dupr_cli.artifacts.labels import Box
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.sources.base import IMAGE_SUFFIXES, BuiltIn, Entry, RawImage
from dupr_cli.prepare.sources.folder import walk

_SPLITS = ("train", "val", "test")


class YoloSource(BuiltIn):
    """A data.yaml, or a folder with one, or a folder with images/ and labels/."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        if path.is_file():
            return path.suffix in (".yaml", ".yml")
        plain = (path / "images").is_dir() and (path / "labels").is_dir()
        return plain or (path.is_dir() and _data_file(path) is not None)

    @cached_property
    def _data(self) -> dict[str, Any]:
        file = self.path if self.path.is_file() else _data_file(self.path)
        if file is None:
            return {}
        try:
            return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: not a data.yaml of YOLO: {error}.") from error

    @property
    def _root(self) -> Path:
        folder = self.path.parent if self.path.is_file() else self.path
        given = Path(str(self._data.get("path", ".")))
        # The folder that a data.yaml names is often that of another machine.
        return folder / given if (folder / given).is_dir() else folder

    @cached_property
    def _names(self) -> list[str]:
        names = self._data.get("names")
        if isinstance(names, dict):
            return [str(names[number]) for number in sorted(names)]
        if isinstance(names, list):
            return [str(name) for name in names]
        file = self._root / "classes.txt"
        return file.read_text(encoding="utf-8").split("\n") if file.is_file() else []

    def entries(self) -> Iterator[Entry]:
        splits = {s: self._data[s] for s in _SPLITS if self._data.get(s)} or self._plain_splits()
        wanted = self.options.splits or list(splits)
        for split in wanted:
            if split not in splits:
                raise UsageError(
                    f"{self.path}: there is no split {split}; it has {', '.join(splits)}."
                )
            places = splits[split]
            for place in places if isinstance(places, list) else [places]:
                for name in self._images(str(place)):
                    yield Entry(name, None, split)

    def _plain_splits(self) -> dict[str, str]:
        images = self._root / "images"
        found = {split: f"images/{split}" for split in _SPLITS if (images / split).is_dir()}
        return found or {"train": "images"}

    def _images(self, place: str) -> Iterator[str]:
        """Images of a folder, or of a text file of paths, relative to the root."""
        path = self._root / place
        if path.is_dir():
            for name in walk(path, self.out):
                yield f"{place.removeprefix('./').rstrip('/')}/{name}"
        elif path.is_file() and path.suffix == ".txt":
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    yield line.strip().removeprefix("./")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield place
        else:
            raise UsageError(
                f"{path}: there is no such folder of images. Correct data.yaml, or put it there."
            )

    def read(self, entry: Entry) -> RawImage:
        """Raises RunError when a line is no label. No labels are an image without objects."""
        image = self._root / entry.name
        above, _, below = str(image).rpartition("/images/")
        labels = Path(f"{above}/labels/{below}" if above else image).with_suffix(".txt")
        lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
        boxes = tuple(
            self._box(line.split(), f"{labels}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        )
        return RawImage(image.read_bytes(), boxes, upright=True, unit=True)

    def _box(self, words: list[str], place: str) -> Box:
        try:
            number, values = int(words[0]), [float(word) for word in words[1:]]
            name = self._names[number] if self._names else str(number)
        except (ValueError, IndexError) as error:
            raise RunError(f"{place}: not a label of YOLO ({error}).") from None
        if len(values) == 4:
            x, y, width, height = values
            return Box(name, x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if len(values) < 6 or len(values) % 2:
            raise RunError(
                f"{place}: a label of YOLO has 4 numbers, or a polygon's, after its class."
            )
        xs, ys = values[::2], values[1::2]
        return Box(name, min(xs), min(ys), max(xs), max(ys), details={"segmentation": [values]})


def _data_file(folder: Path) -> Path | None:
    """data.yaml, or the one YAML file of the folder that names classes."""
    if (folder / "data.yaml").is_file():
        return folder / "data.yaml"
    for file in named(folder, lambda name: name.endswith((".yaml", ".yml"))):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "names:" in text and "train:" in text:
            return file
    return None
