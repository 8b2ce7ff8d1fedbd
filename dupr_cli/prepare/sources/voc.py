"""Reads PASCAL VOC trees of one or several years; equal splits are joined (07+12 trainval)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dupr_cli.datasets.layout import SPLITS
from dupr_cli.datasets.voc import VocTree, find_voc_trees, trees_of_split
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import (
    BuiltIn,
    Entry,
    RawImage,
    plain_key,
    separate_splits,
    stamp_of,
)


class VocSource(BuiltIn):
    """Images and annotations of a VOC tree, or of folders that LabelImg and Roboflow write."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        return path.is_dir() and bool(find_voc_trees(path))

    @cached_property
    def _trees(self) -> dict[str, VocTree]:
        """The trees, by their folder within the source."""
        trees = find_voc_trees(self.path)
        if not trees:
            raise UsageError(
                f"{self.path} holds neither a VOC tree (JPEGImages, Annotations, ImageSets/Main) "
                f"nor XML files beside images."
            )
        return {tree.root.relative_to(self.path).as_posix(): tree for tree in trees}

    def entries(self) -> Iterator[Entry]:
        self.notes = []
        return separate_splits(self._listed(), self.notes)

    def _listed(self) -> Iterator[Entry]:
        for split, parts in self._wanted().items():
            found = False
            for root, list_ in parts:
                tree = self._trees[root]
                # Each year numbers its images separately, except 2008 to 2012, whose ids begin
                # with the year.
                prefix = f"{tree.root.name}_" if len(self._trees) > 1 else ""
                for image_id in tree.image_ids(list_):
                    found = True
                    name = f"{root}/{image_id}" if root != "." else image_id
                    key, stamp = plain_key(f"{prefix}{image_id}"), stamp_of(*tree.files(image_id))
                    yield Entry(name, [root, image_id], split, key, stamp)
            if not found:
                raise UsageError(f"{self.path}: the split {split} lists no images.")

    def _wanted(self) -> dict[str, list[tuple[str, str]]]:
        """The splits of the shards, each with its parts: (folder of a tree, list of that tree)."""
        trees = list(self._trees.values())
        available = {split for tree in trees for split in tree.splits}
        wanted = self.options.splits
        if wanted is None:
            wanted = [s for s in SPLITS if s in available]
            if not {"train", "val"} & set(wanted) and "trainval" in available:
                wanted = ["trainval", *wanted]
            wanted = wanted or sorted(available)
        joined: dict[str, list[tuple[str, str]]] = {}
        for name in wanted:
            parts = trees_of_split(trees, name, str(self.path))
            joined.setdefault(parts[0][1], []).extend(
                (tree.root.relative_to(self.path).as_posix(), split) for tree, split in parts
            )
        return joined

    def read(self, entry: Entry) -> RawImage:
        """Raises RunError when the annotation is missing or damaged."""
        root, image_id = entry.place
        tree = self._trees[root]
        if not tree.has_lists and not tree.is_annotated(image_id):
            # LabelImg writes no file for an image that nobody has labelled yet.
            remark = "no annotation: the image is taken without labels"
            return RawImage(self.read_file(tree.image_path(image_id)), remarks=(remark,))
        labels = tree.labels(image_id)
        return RawImage.of(self.read_file(tree.image_path(image_id)), labels)
