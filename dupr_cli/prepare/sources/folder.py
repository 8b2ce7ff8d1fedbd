"""A folder of images at any depth, and one with a folder for each class, as ImageNet has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import IMAGE_SUFFIXES, BuiltIn, Entry, RawImage, stamp_of

_SPLITS = ("train", "val", "valid", "validation", "test")


def walk(root: Path, exclude: Path | None = None) -> Iterator[str]:
    """Paths of the images under `root`, relative to it, in the order of their names.

    One folder at a time is in memory. Hidden files and folders, and `exclude`, are left out.
    Raises UsageError when a folder cannot be read.
    """
    excluded = exclude.resolve() if exclude else None
    waiting = [""]
    while waiting:
        place = waiting.pop()
        if place and not place.endswith("/"):
            yield place
            continue
        folder = root / place
        if place and excluded is not None and folder.resolve() == excluded:
            continue
        try:
            with os.scandir(folder) as found:
                names = [_name(entry) for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            raise UsageError(
                f"{folder}: the folder cannot be read: {error.strerror}. Make it readable, or move "
                f"it out of the source."
            ) from error
        waiting += [place + name for name in sorted((n for n in names if n), reverse=True)]


def _name(entry: os.DirEntry[str]) -> str:
    """Name of an image, of a folder with / behind it, or nothing."""
    if entry.is_dir(follow_symlinks=False):
        return f"{entry.name}/"
    # Without a Path for each of a million names.
    return entry.name if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES else ""  # noqa: PTH122


class FolderSource(BuiltIn):
    """Every image file under a folder."""

    @classmethod
    def recognises(cls, address: str) -> bool:
        return Path(address).is_dir()

    def entries(self) -> Iterator[Entry]:
        for name in walk(self.path, self.out):
            yield Entry(name, stamp=stamp_of(self.path / name))

    def read(self, entry: Entry) -> RawImage:
        return RawImage((self.path / entry.name).read_bytes())


class ClassFolderSource(FolderSource):
    """<class>/<image>, or <split>/<class>/<image>; the class becomes the label of the image."""

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
        wanted = self.options.splits
        for name in walk(self.path, self.out):
            split, _, rest = name.partition("/")
            if not with_splits:
                split, rest = "train", name
            elif split not in _SPLITS and wanted is None:
                continue
            if "/" in rest and (wanted is None or split in wanted):
                stamp = stamp_of(self.path / name)
                yield Entry(name, PurePosixPath(rest).parts[0], split, stamp=stamp)

    def read(self, entry: Entry) -> RawImage:
        return RawImage((self.path / entry.name).read_bytes(), label=entry.place)
