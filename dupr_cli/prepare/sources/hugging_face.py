"""Reads a data set from the Hugging Face Hub, or a local folder that its `datasets` library reads.

hf://owner/name    hf://owner/name:config    hf:///folder
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dupr_cli.addresses import without_secrets
from dupr_cli.artifacts.hub_weights import HUB, HUB_NAME
from dupr_cli.artifacts.reading import require_size
from dupr_cli.errors import UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, plain_key

_ADDRESS = re.compile(rf"{HUB}(/.*|{HUB_NAME}(/{HUB_NAME})?)(:.+)?")


class HuggingFaceSource(BuiltIn):
    """The image column of every split; the bytes are those stored in the data set."""

    @classmethod
    def recognises(cls, address: str) -> bool:
        return address.startswith(HUB)

    @cached_property
    def _splits(self) -> dict[str, Any]:
        if not _ADDRESS.fullmatch(self.address):
            raise UsageError(
                f"{self.address}: write it as hf://OWNER/NAME, hf://OWNER/NAME:CONFIG, or "
                f"hf:///FOLDER for a folder on this machine, from its root."
            )
        try:
            import datasets
        except ImportError:
            raise UsageError(
                f"{self.address}: this needs the datasets library: pip install 'dupr-cli[hf]'."
            ) from None
        name, _, config = self.address.removeprefix(HUB).partition(":")
        datasets.disable_progress_bars()
        try:
            loaded = datasets.load_dataset(name, config or None)
        except Exception as error:  # builders and the Hub's client raise errors of any kind
            words = without_secrets(str(error))
            raise UsageError(f"{self.address}: `datasets` cannot load it: {words}") from error
        column = self._column(next(iter(loaded.values())).features, datasets.Image)
        plain = datasets.Image(decode=False)
        return {
            split: rows.select_columns([column]).cast_column(column, plain)
            for split, rows in loaded.items()
        }

    def _column(self, features: Any, image: type) -> str:
        wanted = self.options.column
        found = [n for n, kind in features.items() if isinstance(kind, image)]
        if wanted is not None and wanted in features:
            return wanted
        if wanted is not None or not found:
            raise UsageError(
                f"{self.address}: no column {wanted or 'of images'}; its columns are "
                f"{', '.join(features)}. Name one with --set source.column=NAME."
            )
        return str(found[0])

    def entries(self) -> Iterator[Entry]:
        for split in self.options.splits or list(self._splits):
            if split not in self._splits:
                raise UsageError(
                    f"{self.address} has no split {split}; its splits are "
                    f"{', '.join(self._splits)}."
                )
            for row in range(len(self._splits[split])):
                name = f"{split}/{row:09d}"
                yield Entry(name, [split, row], split, plain_key(name))

    def read(self, entry: Entry) -> RawImage:
        split, row = entry.place
        (value,) = self._splits[split][row].values()
        if value["bytes"] is not None:
            require_size(len(value["bytes"]), self.options.max_bytes)
            return RawImage(value["bytes"])
        return RawImage(self.read_file(Path(value["path"])))
