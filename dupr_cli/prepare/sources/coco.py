"""COCO's JSON: boxes, crowds, polygons, masks and keypoints, and the images they are of.

Sources: the COCO data format (cocodataset.org, Data format), the layout of COCO 2017.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dupr_cli.artifacts.labels import Box
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, key_of, plain_key

_INSTANCES, _KEYPOINTS = "instances_", "person_keypoints_"
_SPLITS = ("train", "val", "test")


class CocoSource(BuiltIn):
    """One JSON file, or a folder with annotations/instances_*.json and a folder of each split."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        if path.is_file():
            return path.suffix == ".json"
        return bool(_files(path))

    def entries(self) -> Iterator[Entry]:
        files = [self.path] if self.path.is_file() else _files(self.path)
        if not files:
            raise UsageError(f"{self.path}: there is no annotations/instances_*.json.")
        by_split: dict[str, Path] = {}
        for file in files:
            split = _split_of(file)
            if split in by_split:
                raise UsageError(
                    f"{file} and {by_split[split]} would both be the split {split}. Give the one "
                    f"you want as SOURCE."
                )
            by_split[split] = file
        wanted = self.options.splits or list(by_split)
        for split in wanted:
            if split not in by_split:
                raise UsageError(
                    f"{self.path}: there is no split {split}; it has {', '.join(by_split)}."
                )
            yield from self._entries_of(by_split[split], split)

    def _entries_of(self, file: Path, split: str) -> Iterator[Entry]:
        content = _read(file)
        try:
            images = content["images"]
            folder = self._folder(file, images)
            names = {c["id"]: c["name"] for c in content.get("categories", [])}
            objects: dict[Any, list[Any]] = defaultdict(list)
            keypoints = _keypoints_beside(file)
            for annotation in content.pop("annotations", None) or []:
                image = annotation.pop("image_id")
                objects[image].append(_object(annotation, names, keypoints))
            labelled = bool(names)
            stems = {Path(image["file_name"]).stem for image in images}
            unique = len(stems) == len(images)
            for image in images:
                name = image["file_name"]
                place = {
                    "file": (folder / name).relative_to(self._root).as_posix(),
                    "size": [image.get("width"), image.get("height")],
                    "id": image.get("id"),
                    "objects": objects.pop(image["id"], []) if labelled else None,
                }
                key = plain_key(Path(name).stem) if unique else key_of(name)
                yield Entry(place["file"], place, split, key)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{file}: not as COCO writes it: {type(error).__name__}: {error}."
            ) from error

    @property
    def _root(self) -> Path:
        """What names are relative to: the folder that holds annotations, or that of the images."""
        if self.options.images:
            return Path(self.options.images)
        return _above(self.path) if self.path.is_file() else self.path

    def _folder(self, file: Path, images: list[Any]) -> Path:
        """Where the images lie: the first usual place that has the first of them."""
        root = _above(file)
        year = file.stem.removeprefix(_INSTANCES).removeprefix(_KEYPOINTS)
        places = [root / year, root / "images" / year, root / "images", root, file.parent]
        if self.options.images:
            places = [Path(self.options.images)]
        for place in places:
            if not images or (place / images[0]["file_name"]).is_file():
                return place
        raise UsageError(
            f"{file}: its first image, {images[0]['file_name']}, is not in "
            f"{', '.join(str(place) for place in places)}. Give the folder with "
            f"--set source.images=FOLDER."
        )

    def read(self, entry: Entry) -> RawImage:
        place = entry.place
        objects = place["objects"]
        width, height = place["size"]
        return RawImage(
            (self._root / place["file"]).read_bytes(),
            None if objects is None else tuple(Box.from_json(value) for value in objects),
            size=(width, height) if width and height else None,
            info={"id": place["id"]},
        )


def _above(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "annotations").glob(f"{_INSTANCES}*.json"))


def _split_of(file: Path) -> str:
    """train of instances_train2017.json; the file's own name where it says nothing."""
    name = file.stem.removeprefix(_INSTANCES).removeprefix(_KEYPOINTS)
    return next((split for split in _SPLITS if name.startswith(split)), name)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or "images" not in content:
        raise UsageError(f"{file}: COCO's JSON is an object with images, annotations, categories.")
    return content


def _keypoints_beside(file: Path) -> dict[Any, Mapping[str, Any]]:
    """Keypoints by annotation id: COCO keeps those of people in a file of their own."""
    beside = file.with_name(file.name.replace(_INSTANCES, _KEYPOINTS))
    if beside == file or not beside.is_file():
        return {}
    return {
        annotation["id"]: {name: annotation[name] for name in ("keypoints", "num_keypoints")}
        for annotation in _read(beside)["annotations"]
    }


def _object(
    annotation: dict[str, Any], names: Mapping[Any, str], keypoints: Mapping[Any, Mapping[str, Any]]
) -> dict[str, object]:
    """An annotation as shards hold it. x, y, width, height become the edges of the box."""
    x, y, width, height = annotation.pop("bbox")
    box = Box(
        names[annotation.pop("category_id")], x, y, x + width, y + height,
        crowd=bool(annotation.pop("iscrowd", 0)),
        details={**annotation, **keypoints.get(annotation.get("id"), {})},
    )  # fmt: skip
    return box.to_json()
