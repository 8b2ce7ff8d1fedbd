"""A list of paths or addresses: a text file of one a line, CSV, or Parquet.

Addresses may be of http, https, or whatever fsspec knows (s3://, gs://, ...); paths are relative to
the list's folder.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dupr_cli.artifacts.remote import AbsentError, fetch_bytes, is_remote
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage

# Of old lists of addresses a good part is gone for good; half a minute for each would be weeks.
_ATTEMPTS = 3

_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_path", "url", "image_url")


class ListSource(BuiltIn):
    """One image per line or row."""

    @property
    def remote(self) -> bool:  # type: ignore[override]
        """Whether the first image is: lists are mostly of one kind."""
        return is_remote(next(self._addresses(), ""))

    @classmethod
    def recognises(cls, address: str) -> bool:
        suffix = Path(address).suffix.lower()
        return suffix in (".txt", ".csv", ".tsv", ".parquet") and not is_remote(address)

    def entries(self) -> Iterator[Entry]:
        return map(Entry, self._addresses())

    def _addresses(self) -> Iterator[str]:
        readers = {".csv": self._csv, ".tsv": self._csv, ".parquet": self._parquet}
        try:
            yield from readers.get(self.path.suffix.lower(), self._text)()
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: the list is not UTF-8 text: {error}.") from error

    def _text(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield line.strip()

    def _csv(self) -> Iterator[str]:
        tabs = self.path.suffix.lower() == ".tsv"
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if tabs else ",")
            column = self._column(list(rows.fieldnames or []))
            for row in rows:
                if row[column]:
                    yield row[column]

    def _parquet(self) -> Iterator[str]:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UsageError(
                f"{self.path}: reading Parquet needs pyarrow: pip install 'dupr-cli[hf]'."
            ) from None
        opened: Any = parquet.ParquetFile(self.path)
        column = self._column(opened.schema_arrow.names)
        for batch in opened.iter_batches(columns=[column], batch_size=10_000):
            yield from (value for value in batch.column(0).to_pylist() if value)

    def _column(self, names: list[str]) -> str:
        wanted = self.options.column
        found = [name for name in ([wanted] if wanted else _COLUMNS) if name in names]
        if not found:
            raise UsageError(
                f"{self.path}: no column {wanted or ', '.join(_COLUMNS)}; it has "
                f"{', '.join(names) or 'none'}. Name it with --set source.column=NAME."
            )
        return found[0]

    def read(self, entry: Entry) -> RawImage:
        if not is_remote(entry.name):
            return RawImage((self.path.parent / entry.name).read_bytes())
        try:
            return RawImage(fetch_bytes(entry.name, _ATTEMPTS))
        except AbsentError as error:
            raise RunError(str(error)) from error
