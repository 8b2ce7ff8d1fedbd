"""Recognises the folders of splits and the files of labels, and walks over all images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dupr_cli.artifacts.files import is_image_name
from dupr_cli.errors import UsageError

SPLITS = ("train", "val", "test")


def split_named(name: str) -> str:
    """train, val or test if a name begins with it (train2017, valid), otherwise ""."""
    return next((split for split in SPLITS if name.lower().startswith(split)), "")


def split_folders(root: Path) -> list[Path]:
    """Folders in `root` that are named like splits: first train, then val, then test."""
    if not root.is_dir():
        return []
    with os.scandir(root) as found:
        names = [e.name for e in found if split_named(e.name) and e.is_dir()]
    return [root / name for name in sorted(names, key=lambda n: (SPLITS.index(split_named(n)), n))]


def walk(
    root: Path, exclude: Path | None = None, seen: Callable[[str, list[str]], None] | None = None
) -> Iterator[str]:
    """Paths of the images under `root`, relative to it, in the order of their names.

    Only one folder at a time is in memory. Hidden files and folders, and `exclude`, are left out.
    seen: called with the path and the names of each folder. Raises UsageError when a folder cannot
    be read.
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
                names = [
                    f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name
                    for e in found
                    if not e.name.startswith(".")
                ]
        except OSError as error:
            raise UsageError(
                f"{folder}: the folder cannot be read: {error.strerror}. Make it readable, or move "
                f"it out of the source."
            ) from error
        if seen is not None:
            seen(place, names)
        wanted = (name for name in names if name.endswith("/") or is_image_name(name))
        waiting += [place + name for name in sorted(wanted, reverse=True)]


def has_images(folder: Path) -> bool:
    """Whether the folder holds an image file at any depth."""
    return next(walk(folder), None) is not None


def is_label_name(path: str) -> bool:
    """Whether a path looks like a label file, judged by its name and folders alone."""
    *folders, name = path.lower().split("/")
    if not name.endswith((".xml", ".txt", ".json", ".csv")):
        return False
    by_name = name.endswith((".xml", ".coco.json")) or "annotations" in name or "instances" in name
    return by_name or any(folder in ("annotations", "labels") for folder in folders)
