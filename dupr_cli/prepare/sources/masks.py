"""Reads images with semantic masks: Cityscapes, plain folders, and VOC trees by name of the kind.

VOC trees are taken for their boxes unless the recipe asks for `source.kind: masks`, because their
lists of masks name fewer images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dupr_cli.artifacts.shard_files import MASK_CLASSES
from dupr_cli.datasets.semantic import MaskSource, holds_masks, mask_splits, open_masks
from dupr_cli.prepare.sources.base import (
    BuiltIn,
    Entry,
    RawImage,
    plain_key,
    separate_splits,
    stamp_of,
)
from dupr_cli.recipe.prepare import SourceSection


class MaskFolderSource(BuiltIn):
    """Images whose pixels all have a class."""

    labelled = True

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        super().__init__(address, options, out)
        self._opened: dict[str, tuple[MaskSource, dict[str, int]]] = {}

    @classmethod
    def recognises(cls, address: str) -> bool:
        return holds_masks(Path(address))

    def _open(self, split: str) -> tuple[MaskSource, dict[str, int]]:
        """The images of a split, and their numbers by id."""
        if split not in self._opened:
            source = open_masks(self.address, [split])
            self._opened[split] = source, {id_: n for n, id_ in enumerate(source.ids)}
        return self._opened[split]

    def entries(self) -> Iterator[Entry]:
        self.notes = []
        return separate_splits(self._listed(), self.notes)

    def _listed(self) -> Iterator[Entry]:
        for split in self.options.splits or mask_splits(self.path):
            source, numbers = self._open(split)
            self.notes += source.notes
            for image_id, number in numbers.items():
                image = Path(source.place(number))
                stamp = stamp_of(image, Path(source.mask_place(number)))
                name = image.relative_to(self.path).as_posix()
                yield Entry(name, [split, image_id], split, plain_key(image_id), stamp)

    def read(self, entry: Entry) -> RawImage:
        """Raises RunError when the mask is missing or damaged."""
        split, image_id = entry.place
        source, numbers = self._open(split)
        number = numbers[image_id]
        return RawImage(
            self.read_file(Path(source.place(number))),
            info={MASK_CLASSES: source.classes},
            mask=source.mask(number),
        )
