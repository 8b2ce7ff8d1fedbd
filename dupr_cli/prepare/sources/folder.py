"""Reads a folder of images at any depth, or one folder per class as in ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from dupr_cli.artifacts.files import is_image_name
from dupr_cli.datasets.layout import is_label_name, walk
from dupr_cli.prepare.sources.archive import archives
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, labels_not_read, stamp_of

_SPLITS = ("train", "val", "valid", "validation", "test")


class FolderSource(BuiltIn):
    """Every image file under a folder."""

    @classmethod
    def recognises(cls, address: str) -> bool:
        return Path(address).is_dir()

    def entries(self) -> Iterator[Entry]:
        for name in self._walked():
            yield Entry(name, stamp=stamp_of(self.path / name))

    def _walked(self) -> Iterator[str]:
        """The images; afterwards `notes` names the other files among them that are not read."""
        self.notes, found = [], list[str]()
        yield from walk(self.path, self.out, partial(_add_labels, found))
        if found:
            self.notes.append(labels_not_read(str(self.path), found))
        packed = archives(self.path)
        if packed:
            self.notes.append(
                f"{self.path}: {len(packed)} archives beside the images were not read; the first "
                f"is {packed[0].name}. Use --set source.kind=archive to read them instead"
            )

    def read(self, entry: Entry) -> RawImage:
        return RawImage(self.read_file(self.path / entry.name))


def _add_labels(found: list[str], place: str, names: list[str]) -> None:
    """Add the files of a folder that look like labels, also by sharing the name of an image."""
    texts = [name for name in names if name.lower().endswith((".xml", ".txt", ".json", ".csv"))]
    if texts:
        images = {name.rpartition(".")[0] for name in names if is_image_name(name)}
        found += sorted(
            place + name
            for name in texts
            if name.rpartition(".")[0] in images or is_label_name(place + name)
        )


class ClassFolderSource(FolderSource):
    """<class>/<image> or <split>/<class>/<image>; the class becomes the label of the image."""

    @classmethod
    def recognises(cls, address: str) -> bool:
        train = Path(address) / "train"
        if not train.is_dir():
            return False
        with os.scandir(train) as found:
            kinds = [entry.is_dir() for entry in found if not entry.name.startswith(".")]
        return bool(kinds) and all(kinds)

    def entries(self) -> Iterator[Entry]:
        with_splits = self.recognises(self.address)
        wanted, others = self.options.splits, list[str]()
        for name in self._walked():
            split, _, rest = name.partition("/")
            if not with_splits:
                split, rest = "train", name
            if wanted is not None and split not in wanted:
                continue
            if "/" in rest and (wanted is not None or not with_splits or split in _SPLITS):
                stamp = stamp_of(self.path / name)
                yield Entry(name, PurePosixPath(rest).parts[0], split, stamp=stamp)
            else:
                others.append(name)
        if others:
            self.notes.append(
                f"{self.path}: {len(others)} images outside the class folders were not read; the "
                f"first is {others[0]}. Use --set source.kind=folder to read all images without "
                f"classes"
            )

    def read(self, entry: Entry) -> RawImage:
        return RawImage(self.read_file(self.path / entry.name), label=entry.place)
