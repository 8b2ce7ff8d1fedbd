"""What people have: a folder of images, a PASCAL VOC tree, or WebDataset shards, as lists of items.

An item knows where an image and its boxes lie; reading it is left to the workers. Lists are sorted,
so that the same source gives the same shards.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.artifacts.shards import Box, ShardSet, is_shard_folder, open_shards
from dupr_cli.artifacts.voc_tree import VocTree, find_voc_trees
from dupr_cli.errors import RunError, UsageError
from dupr_cli.recipe import PrepareRecipe

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)


@dataclass(frozen=True)
class RawImage:
    """An image as the source has it. boxes: None where the source has no labels."""

    data: bytes
    boxes: tuple[Box, ...] | None


@dataclass(frozen=True)
class FileItem:
    """An image file of a folder. name: its path from the folder, which names it in shards."""

    path: Path
    name: str

    @property
    def key(self) -> str:
        # Files of one stem in several folders, or of several suffixes, need keys of their own.
        stem = re.sub(r"[^\w-]", "_", Path(self.name).stem)
        return f"{stem}-{hashlib.sha256(self.name.encode()).hexdigest()[:10]}"

    def read(self) -> RawImage:
        return RawImage(self.path.read_bytes(), None)


@dataclass(frozen=True)
class VocItem:
    """An image of a VOC tree with its annotation."""

    tree: VocTree
    image_id: str
    prefix: str

    @property
    def name(self) -> str:
        return str(self.tree.image_path(self.image_id).relative_to(self.tree.root))

    @property
    def key(self) -> str:
        return f"{self.prefix}{self.image_id}".replace(".", "_")

    def read(self) -> RawImage:
        """Raises RunError when the annotation is missing or damaged."""
        boxes = tuple(self.tree.boxes(self.image_id))
        return RawImage(self.tree.image_path(self.image_id).read_bytes(), boxes)


@dataclass(frozen=True)
class ShardItem:
    """A sample of existing shards."""

    shards: ShardSet
    number: int
    key: str

    @property
    def name(self) -> str:
        shard, _ = self.shards.place(self.number)
        return f"{self.shards.shards[shard].name}/{self.key}"

    def read(self) -> RawImage:
        sample = self.shards[self.number]
        return RawImage(sample.image, sample.boxes)


Item = FileItem | VocItem | ShardItem


@dataclass(frozen=True)
class Source:
    """All items of a source, by split. digest: identity of the listing."""

    address: Path
    kind: str
    splits: dict[str, Sequence[Item]]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for split, items in self.splits.items():
            for item in items:
                digest.update(f"{split}\0{item.name}\n".encode())
        return digest.hexdigest()


def open_source(path: Path, recipe: PrepareRecipe, out: Path) -> Source:
    """List a source; what it is, is seen from its contents.

    out: left out of the listing when it lies inside the source.
    Raises UsageError when there is nothing to prepare.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such folder.")
    if path.is_file() and path.suffix != ".tar":
        raise UsageError(
            f"{path}: a folder of images, a VOC tree or WebDataset shards (.tar) is needed."
        )
    trees = find_voc_trees(path) if path.is_dir() else []
    if trees:
        return Source(path, "VOC tree", _voc_splits(trees, recipe.voc.splits, path))
    if recipe.voc.splits is not None:
        raise UsageError(f"{path}: voc.splits is set, but this is not a VOC tree.")
    if path.is_file() or is_shard_folder(path):
        return Source(path, "shards", _shard_splits(path))
    items = _folder_items(path, out)
    if not items:
        anything = any(path.iterdir())
        what = "no images in it, at any depth" if anything else "the folder is empty"
        raise UsageError(
            f"{path}: {what}. Known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}; also taken are "
            f"VOC trees (JPEGImages, Annotations, ImageSets/Main) and WebDataset shards (.tar)."
        )
    return Source(path, "folder", {"train": items})


def _folder_items(path: Path, out: Path) -> list[FileItem]:
    items, excluded = [], out.resolve()
    for folder, folders, files in os.walk(path):
        folders[:] = [
            f for f in folders if not f.startswith(".") and (Path(folder) / f).resolve() != excluded
        ]
        for file in files:
            found = Path(folder) / file
            if found.suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                items.append(FileItem(found, found.relative_to(path).as_posix()))
    return sorted(items, key=lambda item: item.name)


def _voc_splits(
    trees: list[VocTree], wanted: list[str] | None, path: Path
) -> dict[str, Sequence[Item]]:
    available = {split for tree in trees for split in tree.splits}
    if wanted is None:
        wanted = [s for s in ("train", "val", "test") if s in available]
        if not {"train", "val"} & set(wanted) and "trainval" in available:
            wanted = ["trainval", *wanted]
        wanted = wanted or sorted(available)
    unknown = [split for split in wanted if split not in available]
    if unknown or not wanted:
        raise UsageError(
            f"{path}: the VOC tree has no split {', '.join(unknown) or 'at all'}; "
            f"ImageSets/Main has {', '.join(sorted(available)) or 'no lists'}."
        )
    splits: dict[str, Sequence[Item]] = {}
    for split in wanted:
        items: list[VocItem] = []
        for tree in trees:
            # Years number their images apart, except 2008 to 2012, whose ids begin with the year.
            prefix = f"{tree.root.name}_" if len(trees) > 1 else ""
            if split in tree.splits:
                items += [VocItem(tree, i, prefix) for i in tree.image_ids(split)]
        if not items:
            raise UsageError(f"{path}: the split {split} lists no images.")
        splits[split] = items
    return splits


def _shard_splits(path: Path) -> dict[str, Sequence[Item]]:
    from dupr_cli.artifacts.shards import MANIFEST, Manifest

    has_manifest = (path / MANIFEST).is_file()
    names: list[str | None] = [*Manifest.read(path).splits] if has_manifest else [None]
    splits: dict[str, Sequence[Item]] = {}
    for name in names:
        try:
            shards = open_shards(str(path), name)
        except RunError as error:
            raise UsageError(str(error)) from error
        # Keys may hold a folder; in ours they are plain.
        keys = [key.replace("/", "_") for key in shards.keys()]  # noqa: SIM118
        splits[name or "train"] = [ShardItem(shards, i, key) for i, key in enumerate(keys)]
    return splits
