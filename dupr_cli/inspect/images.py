"""The images of a set that a picture searches: a folder, or shards."""

from __future__ import annotations

from pathlib import Path

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.datasets.layout import walk
from dupr_cli.datasets.shards import holds_shards, require_format
from dupr_cli.errors import UsageError
from dupr_cli.probe.data import ImageSet
from dupr_cli.probe.image_readers import Files, Samples
from dupr_cli.progress import Reporter


def open_images(address: str | Path, pixels: PixelFormat | None, reporter: Reporter) -> ImageSet:
    """All images of a folder at any depth, or of shards, whatever labels they have.

    pixels: the format that the network takes. Raises UsageError when there are none.
    """
    address, path = str(address), Path(address)
    if is_remote(address) or address.endswith(".tar") or (path.is_dir() and holds_shards(path)):
        shards = open_shards(address)
        require_format(address, shards.pixels, pixels, reporter)
        ids = tuple(shards.keys())
        return ImageSet(address, "all", ids, (), Samples(shards, pixels), tuple(range(len(ids))))
    if not path.is_dir():
        raise UsageError(
            f"{address}: the folder or shard does not exist. Give a folder of images, or shards."
        )
    names = tuple(walk(path))
    if not names:
        raise UsageError(f"{address}: the folder contains no images.")
    files = Files(tuple(path / name for name in names), pixels)
    return ImageSet(address, "all", names, (), files, tuple(range(len(names))))
