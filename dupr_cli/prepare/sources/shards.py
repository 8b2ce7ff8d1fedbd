"""Reads WebDataset shards, written by dupr or another tool, to reshard, filter or resize them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dupr_cli.artifacts.reading import require_size
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.artifacts.shard_files import MASK, MASK_CLASSES
from dupr_cli.artifacts.shards import (
    MANIFEST,
    Manifest,
    ShardSet,
    open_shards,
)
from dupr_cli.datasets.masks import read_mask
from dupr_cli.datasets.shards import holds_shards, labels_of
from dupr_cli.errors import RunError, UsageError
from dupr_cli.outside_text import tar_key
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, plain_key, stamp_of
from dupr_cli.recipe.prepare import SourceSection


class ShardSource(BuiltIn):
    """The samples of a folder of shards, a tar or a brace pattern, also over http or fsspec."""

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        super().__init__(address, options, out)
        self._opened: dict[str | None, ShardSet] = {}

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        return (
            not is_remote(self.address)
            and (self.path / MANIFEST).is_file()
            and bool(Manifest.read(self.path).classes)
        )

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        if is_remote(address) or "{" in address:
            return not address.lower().endswith((".txt", ".csv", ".parquet"))
        return path.suffix == ".tar" or (path.is_dir() and holds_shards(path))

    def _open(self, split: str | None) -> ShardSet:
        if split not in self._opened:
            try:
                self._opened[split] = open_shards(self.address, split)
            except RunError as error:
                raise UsageError(str(error)) from error
            self._opened[split].cached_indexes = 8
        return self._opened[split]

    def _splits(self) -> list[str | None]:
        if self.options.splits is not None:
            return list(self.options.splits)
        if not is_remote(self.address) and (self.path / MANIFEST).is_file():
            return list(Manifest.read(self.path).splits)
        return [None]

    def entries(self) -> Iterator[Entry]:
        for split in self._splits():
            shards = self._open(split)
            number = 0
            for shard, tar in enumerate(shards.shards):
                index = shards.index(shard)
                stamp = index.sha256[:16] or stamp_of(tar)
                for key in index.keys:
                    name = f"{tar.name}/{key}"
                    place = [split, number]
                    yield Entry(name, place, split or "train", plain_key(key), stamp)
                    number += 1

    def read(self, entry: Entry) -> RawImage:
        split, number = entry.place
        shards = self._open(split)
        require_size(shards.bytes_of(number), self.options.max_bytes)
        sample = shards.whole(number)
        extras, mask = dict(sample.extras), None
        if MASK_CLASSES in sample.info and MASK in extras:
            mask = read_mask(io.BytesIO(extras.pop(MASK)), f"{entry.name}.{MASK}")
        return replace(
            RawImage.of(sample.image, labels_of(sample)),
            label=sample.label,
            source=sample.source,
            info=sample.info,
            extras={tar_key(suffix): data for suffix, data in extras.items()},
            pixels=sample.pixels,
            mask=mask,
        )
