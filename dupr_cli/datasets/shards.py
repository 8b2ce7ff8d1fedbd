"""Reads shards, written by dupr or another tool, as a labelled set or as plain images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from dupr_cli.artifacts.files import named
from dupr_cli.artifacts.pixel_formats import PixelFormat, described
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import MANIFEST, Manifest, ShardSet
from dupr_cli.datasets.layout import has_images
from dupr_cli.datasets.placement import Labels
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import Reporter


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds shards: a manifest, or tars and no loose images at any depth."""
    if (folder / MANIFEST).is_file():
        return True
    return bool(named(folder, lambda name: name.endswith(".tar"))) and not has_images(folder)


def kept_format(address: str) -> PixelFormat | None:
    """The format of the images of shards with a manifest that keep their channels, else None."""
    folder = Path(address)
    return Manifest.read(folder).pixels if (folder / MANIFEST).is_file() else None


def require_format(
    address: str, kept: PixelFormat | None, pixels: PixelFormat | None, reporter: Reporter
) -> None:
    """Raises UsageError when shards keep other channels than the weights take; warns of another
    range.

    kept: format of the shards; None for shards of RGB and for other sets, whose images are looked
    at one by one. pixels: what the weights take.
    """
    if kept is None:
        return
    if pixels is None or kept.channels != pixels.channels:
        raise UsageError(
            f"{address}: the shards hold {described(kept)}, but the weights take "
            f"{described(pixels)}. Prepare the images in that format, or give other weights."
        )
    if kept != pixels:
        reporter.warning(
            f"{address}: the shards were prepared for {kept}, but the weights were trained on "
            f"{pixels}; the images are scaled as the weights take them"
        )


def labels_of(sample: Sample) -> Labels | None:
    """Labels of a sample, or None if it has none."""
    if sample.boxes is None:
        return None
    size = (sample.width, sample.height) if sample.width > 0 and sample.height > 0 else None
    return Labels(sample.boxes, size)


class ShardSplit:
    """Samples of one split of shards."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self.ids = list(shards.keys())
        self.notes: list[str] = []

    def place(self, number: int) -> str:
        shard, _ = self._shards.place(number)
        return f"{self._shards.shards[shard]}: sample {self.ids[number]}"

    def image(self, number: int) -> BinaryIO:
        return io.BytesIO(self._shards[number].image)

    def labels(self, number: int) -> Labels:
        """Raises RunError when the sample has no labels."""
        labels = labels_of(self._shards.described(number))
        if labels is None:
            raise RunError(
                f"{self.place(number)} has no boxes (no {self.ids[number]}.boxes.json). Give a "
                f"labelled set: a VOC tree, or the shards that `dupr prepare` makes from one."
            )
        return labels
