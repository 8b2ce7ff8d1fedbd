"""Reads YOLO's labels: a data.yaml, or folders as Ultralytics and labelling tools write them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dupr_cli.datasets.layout import split_named
from dupr_cli.datasets.yolo import YoloSet, is_yolo
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, separate_splits, stamp_of


class YoloSource(BuiltIn):
    """The images of a YOLO data set, with their labels."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        return is_yolo(Path(address))

    @cached_property
    def _set(self) -> YoloSet:
        return YoloSet(self.path, self.out)

    def entries(self) -> Iterator[Entry]:
        self.notes = list(self._set.notes)
        return separate_splits(self._listed(), self.notes)

    def _listed(self) -> Iterator[Entry]:
        for given in self.options.splits or list(self._set.splits):
            split = given if given in self._set.splits else split_named(given) or given
            if split == "test" and not self.options.splits and not self._set.exists(split):
                # Roboflow names a test split in data.yaml even if it has exported none.
                self.notes.append(f"{self.path}: the test split of data.yaml does not exist")
                continue
            for name in self._set.images(split):
                yield Entry(name, None, split, stamp=stamp_of(*self._set.files(name)))

    def read(self, entry: Entry) -> RawImage:
        """Raises RunError when the label file is not text."""
        image = self._set.path_of(entry.name)
        return RawImage.of(self.read_file(image), self._set.labels(entry.name))
