"""Reads COCO's JSON: images with boxes, crowds, polygons, masks and keypoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.coco import (
    CocoSet,
    coco_files,
    coco_root,
    coco_split,
    find_split,
    image_folder,
    image_folders,
    image_path,
    read_coco,
    with_keypoints,
)
from dupr_cli.datasets.placement import Labels
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import (
    BuiltIn,
    Entry,
    RawImage,
    key_of,
    plain_key,
    separate_splits,
    stamp_of,
)


class CocoSource(BuiltIn):
    """One JSON file, or a folder with one per split, as COCO or another tool writes them."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        if path.is_file():
            return path.suffix.lower() == ".json"
        return bool(coco_files(path))

    def entries(self) -> Iterator[Entry]:
        self.notes = []
        return separate_splits(self._listed(), self.notes)

    def _listed(self) -> Iterator[Entry]:
        files = [self.path] if self.path.is_file() else coco_files(self.path)
        if not files:
            raise UsageError(f"{self.path}: annotations/instances_*.json is missing.")
        if self.options.splits is None:
            # Other JSON files beside instances_*.json are not labels of boxes.
            files = [f for f in files if f.name.startswith("instances_")] or files
        by_split: dict[str, Path] = {}
        for file in files:
            split = coco_split(file)
            if split in by_split:
                raise UsageError(
                    f"{file} and {by_split[split]} would both be the split {split}. Give the one "
                    f"you want as SOURCE."
                )
            by_split[split] = file
        for given in self.options.splits or list(by_split):
            found = find_split(files, given)
            if not found:
                raise UsageError(
                    f"{self.path} has no split {given}; its splits are {', '.join(by_split)}."
                )
            yield from self._entries_of(found[0], coco_split(found[0]))

    def _entries_of(self, file: Path, split: str) -> Iterator[Entry]:
        coco = with_keypoints(read_coco(file))
        self.notes += coco.notes
        folder = self._folder(coco)
        stems = {Path(image.file_name.replace("\\", "/")).stem for image in coco.images}
        for image in coco.images:
            path = image_path(folder, image.file_name)
            if not path.is_relative_to(self._root):
                raise UsageError(f"{file}: image {image.id}: {path} is not below {self._root}.")
            name = path.relative_to(self._root).as_posix()
            labels = image.labels
            place = {
                "file": name,
                "size": labels.size,
                "id": image.id,
                "objects": [box.to_json() for box in labels.boxes] if coco.categories else None,
                "left_out": labels.left_out,
                "remarks": labels.remarks,
            }
            unique = len(stems) == len(coco.images)
            key = plain_key(path.stem) if unique else key_of(name)
            described = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
            yield Entry(name, place, split, key, f"{stamp_of(path)},{described[:16]}")

    @property
    def _root(self) -> Path:
        """The folder that names are relative to: `source.images`, or the parent of annotations/."""
        if self.options.images:
            return Path(self.options.images)
        return coco_root(self.path) if self.path.is_file() else self.path

    def _folder(self, coco: CocoSet) -> Path:
        """The folder of the images: the given one, or the first usual one that holds an image."""
        given = self.options.images
        places = [Path(given)] if given else image_folders(coco.file)
        found = image_folder(coco, places)
        if found is None:
            raise UsageError(
                f"{coco.file}: its first image, {coco.images[0].file_name}, is not in "
                f"{', '.join(str(place) for place in places)}. Give the folder of the images with "
                f"--set source.images=FOLDER."
            )
        return found

    def read(self, entry: Entry) -> RawImage:
        place = entry.place
        data, info = self.read_file(self._root / place["file"]), {"id": place["id"]}
        if place["objects"] is None:
            return RawImage(data, info=info)
        labels = Labels(
            tuple(Box.from_json(value) for value in place["objects"]),
            tuple(place["size"]) if place["size"] else None,
            left_out=tuple(place["left_out"]),
            remarks=tuple(place["remarks"]),
        )
        return replace(RawImage.of(data, labels), info=info)
