"""COCO's JSON: boxes, crowds, polygons, masks and keypoints, and the images they are of.

Sources: the COCO data format (cocodataset.org, Data format), the layout of COCO 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.coco import (
    CocoSet,
    coco_files,
    coco_root,
    coco_split,
    image_folder,
    image_folders,
    read_coco,
    with_keypoints,
)
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, key_of, plain_key


class CocoSource(BuiltIn):
    """One JSON file, or a folder with annotations/instances_*.json and a folder of each split."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        if path.is_file():
            return path.suffix == ".json"
        return bool(coco_files(path))

    def entries(self) -> Iterator[Entry]:
        files = [self.path] if self.path.is_file() else coco_files(self.path)
        if not files:
            raise UsageError(f"{self.path}: there is no annotations/instances_*.json.")
        by_split: dict[str, Path] = {}
        for file in files:
            split = coco_split(file)
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
        coco = with_keypoints(read_coco(file))
        folder = self._folder(coco)
        unique = len({Path(image.file_name).stem for image in coco.images}) == len(coco.images)
        for image in coco.images:
            path = folder / image.file_name
            if not path.is_relative_to(self._root):
                raise UsageError(f"{file}: image {image.id}: {path} is not below {self._root}.")
            place = {
                "file": path.relative_to(self._root).as_posix(),
                "size": [image.width, image.height],
                "id": image.id,
                "objects": [box.to_json() for box in image.objects] if coco.categories else None,
            }
            key = plain_key(Path(image.file_name).stem) if unique else key_of(image.file_name)
            yield Entry(str(place["file"]), place, split, key)

    @property
    def _root(self) -> Path:
        """What names are relative to: the folder that holds annotations, or that of the images."""
        if self.options.images:
            return Path(self.options.images)
        return coco_root(self.path) if self.path.is_file() else self.path

    def _folder(self, coco: CocoSet) -> Path:
        """Where the images lie: the folder given, or the first usual place that has the first."""
        given = self.options.images
        places = [Path(given)] if given else image_folders(coco.file)
        found = image_folder(coco, places)
        if found is None:
            raise UsageError(
                f"{coco.file}: its first image, {coco.images[0].file_name}, is not in "
                f"{', '.join(str(place) for place in places)}. Give the folder with "
                f"--set source.images=FOLDER."
            )
        return found

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
