"""Reads a list of paths or addresses: a text file with one per line, CSV, or Parquet.

Addresses may use http, https, or any scheme that fsspec knows (s3://, gs://, ...). Paths are
relative to the list's folder.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dupr_cli.artifacts.files import is_image_name, is_possible_path
from dupr_cli.artifacts.paced_http import Pace
from dupr_cli.artifacts.remote import AbsentError, fetch_bytes, is_remote
from dupr_cli.datasets.text import encoding_of, not_text
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, stamp_of

# Many addresses of an old list no longer exist; half a minute for each would add up to weeks.
_ATTEMPTS = 3

_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_path", "url", "image_url")


class ListSource(BuiltIn):
    """One image per line or row."""

    @property
    def remote(self) -> bool:  # type: ignore[override]
        """Whether the first image is remote: most lists are of one kind."""
        return is_remote(next(self._addresses(), ""))

    @classmethod
    def recognises(cls, address: str) -> bool:
        suffix = Path(address).suffix.lower()
        return suffix in (".txt", ".csv", ".tsv", ".parquet") and not is_remote(address)

    def entries(self) -> Iterator[Entry]:
        for address in self._addresses():
            stamp = "" if is_remote(address) else stamp_of(self.path.parent / address)
            yield Entry(address, stamp=stamp)

    def _addresses(self) -> Iterator[str]:
        readers = {".csv": self._csv, ".tsv": self._csv, ".parquet": self._parquet}
        try:
            yield from readers.get(self.path.suffix.lower(), self._text)()
        except UnicodeError as error:
            raise not_text(self.path, error) from error

    def _text(self) -> Iterator[str]:
        with self.path.open(encoding=encoding_of(self.path)) as lines:
            for line in lines:
                if line.strip() and not self._is_comment(line.strip()):
                    yield self._address(line.strip())

    def _is_comment(self, line: str) -> bool:
        if not line.startswith("#"):
            return False
        return not (is_possible_path(line) and (self.path.parent / line).is_file())

    def _address(self, line: str) -> str:
        """The path or address in a line, without a label after it, as in ImageNet's lists."""
        if not is_possible_path(line):
            return line  # reading it says why it is none
        if is_remote(line) or (is_image_name(line) and "\\" not in line):
            return line  # spares millions of file system lookups
        address, _, label = line.rpartition(" ")
        for given in (line, address.strip()) if label.isdigit() and address.strip() else (line,):
            for name in (given, given.replace("\\", "/").removeprefix("./")):
                if (self.path.parent / name).is_file():
                    return name
        return line

    def _csv(self) -> Iterator[str]:
        with self.path.open(encoding=encoding_of(self.path), newline="") as file:
            head = file.readline()
            file.seek(0)
            tabs = self.path.suffix.lower() == ".tsv"
            rows = csv.reader(file, delimiter="\t" if tabs else max(",;\t", key=head.count))
            names = next(rows, [])
            column = self._numbered(names)
            if column is None:  # no header: the first line names an image
                column = next((n for n, value in enumerate(names) if is_image_name(value)), None)
                if column is None or self.options.column:
                    raise self._no_column(names)
                yield self._address(names[column].strip())
            for row in rows:
                if len(row) > column and row[column].strip():
                    yield self._address(row[column].strip())

    def _parquet(self) -> Iterator[str]:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UsageError(
                f"{self.path}: reading Parquet needs pyarrow: pip install 'dupr-cli[hf]'."
            ) from None
        opened: Any = parquet.ParquetFile(self.path)
        names = opened.schema_arrow.names
        number = self._numbered(names)
        if number is None:
            raise self._no_column(names)
        column = names[number]
        for batch in opened.iter_batches(columns=[column], batch_size=10_000):
            yield from (value for value in batch.column(0).to_pylist() if value)

    def _numbered(self, names: list[str]) -> int | None:
        """Number of the column of images, or None if no column has such a name."""
        plain = [name.strip().lower() for name in names]
        wanted = [self.options.column] if self.options.column else _COLUMNS
        for name in wanted:
            if name in names:
                return names.index(name)
            if name.lower() in plain:
                return plain.index(name.lower())
        return None

    def _no_column(self, names: list[str]) -> UsageError:
        return UsageError(
            f"{self.path}: no column {self.options.column or ', '.join(_COLUMNS)}; its columns are "
            f"{', '.join(names) or 'none'}. Name one with --set source.column=NAME."
        )

    def read(self, entry: Entry) -> RawImage:
        path = entry.name.removeprefix("file://")  # fsspec would open a pipe there
        if not is_remote(path):
            return RawImage(self.read_file(self.path.parent / path))
        pace = Pace(self.options.min_rate, self.options.max_seconds)
        try:
            return RawImage(fetch_bytes(path, _ATTEMPTS, self.options.max_bytes, pace))
        except AbsentError as error:
            raise RunError(str(error)) from error
