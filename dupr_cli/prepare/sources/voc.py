"""PASCAL VOC trees: one year or several, whose splits of one name are joined (07+12 trainval)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dupr_cli.datasets.voc import VocTree, find_voc_trees
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, plain_key


class VocSource(BuiltIn):
    """Images and annotations of a VOC tree."""

    labelled = True

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        return path.is_dir() and bool(find_voc_trees(path))

    def entries(self) -> Iterator[Entry]:
        trees = find_voc_trees(self.path)
        if not trees:
            raise UsageError(
                f"{self.path}: there is no VOC tree (JPEGImages, Annotations, ImageSets/Main)."
            )
        for split, parts in self._wanted(trees).items():
            found = False
            for tree, list_ in parts:
                # Years number their images apart, except 2008 to 2012, whose ids begin with the
                # year.
                prefix = f"{tree.root.name}_" if len(trees) > 1 else ""
                root = tree.root.relative_to(self.path).as_posix()
                for image_id in tree.image_ids(list_):
                    found = True
                    name = f"{root}/{image_id}" if root != "." else image_id
                    yield Entry(name, [root, image_id], split, plain_key(f"{prefix}{image_id}"))
            if not found:
                raise UsageError(f"{self.path}: the split {split} lists no images.")

    def _wanted(self, trees: list[VocTree]) -> dict[str, list[tuple[VocTree, str]]]:
        """Splits of the shards, each with the lists of the tree that make it up."""
        available = {split for tree in trees for split in tree.splits}
        wanted = self.options.splits
        if wanted is None:
            wanted = [s for s in ("train", "val", "test") if s in available]
            if not {"train", "val"} & set(wanted) and "trainval" in available:
                wanted = ["trainval", *wanted]
            wanted = wanted or sorted(available)
        joined: dict[str, list[tuple[VocTree, str]]] = {}
        for name in wanted:
            year, _, split = name.rpartition("/")
            parts = [
                (tree, split)
                for tree in trees
                if tree.root.name.endswith(year) and split in tree.splits
            ]
            if not parts:
                years = ", ".join(tree.root.name for tree in trees)
                raise UsageError(
                    f"{self.path}: the VOC tree has no split {name}; ImageSets/Main of {years} has "
                    f"{', '.join(sorted(available)) or 'no lists'}."
                )
            joined.setdefault(split, []).extend(parts)
        if not joined:
            raise UsageError(f"{self.path}: ImageSets/Main has no lists of images.")
        return joined

    def read(self, entry: Entry) -> RawImage:
        """Raises RunError when the annotation is missing or damaged."""
        root, image_id = entry.place
        tree = VocTree(self.path / root)
        annotation = tree.annotation(image_id)
        return RawImage(
            tree.image_path(image_id).read_bytes(), tuple(annotation.boxes), size=annotation.size
        )
