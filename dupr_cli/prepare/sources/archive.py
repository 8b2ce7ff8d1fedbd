"""Reads tar and zip archives of images: one archive, or a folder of them.

Members are read in place. A compressed tar can only be read from its start, so it is first
decompressed into a plain tar beside the unfinished shards.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from dupr_cli.artifacts.files import atomic_file, is_image_name, named
from dupr_cli.artifacts.reading import Readable, read_whole, require_size
from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED
from dupr_cli.datasets.layout import has_images, is_label_name
from dupr_cli.errors import RunError, UsageError
from dupr_cli.prepare.sources.base import BuiltIn, Entry, RawImage, labels_not_read

_OPEN: dict[str, Callable[[Path], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
_SUFFIXES = (".tar", ".zip", *_OPEN)
_UNREADABLE = (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)
_DAMAGED = (tarfile.TarError, OSError, *_UNREADABLE)


def archives(path: Path) -> list[Path]:
    """The archive itself, or the archives in a folder, sorted by name."""

    def is_archive(name: str) -> bool:
        return name.lower().endswith(_SUFFIXES)

    found = named(path, is_archive) if path.is_dir() else [path]
    return [p for p in found if is_archive(p.name) and p.is_file()]


def _is_shard(tar: Path) -> bool:
    """Whether a plain tar is a WebDataset shard: some of its first files share a key."""
    if tar.with_suffix(".index.json").exists() or (tar.parent / MANIFEST).exists():
        return True
    try:
        with tarfile.open(tar, "r:") as opened:
            names = [m.name for m, _ in zip(opened, range(20), strict=False) if m.isfile()]
    except (tarfile.TarError, EOFError):
        return False
    return len({name.rpartition("/")[2].partition(".")[0] for name in names}) < len(names)


class ArchiveSource(BuiltIn):
    """Every image file in one or more archives."""

    @classmethod
    def recognises(cls, address: str) -> bool:
        path = Path(address)
        found = archives(path)
        # An archive beside images is usually something else: a devkit, a backup of labels.
        if not found or (path.is_dir() and has_images(path)):
            return False
        return not (found[0].suffix == ".tar" and _is_shard(found[0]))

    def entries(self) -> Iterator[Entry]:
        self.notes, labels = [], list[str]()
        for archive in archives(self.path):
            try:
                for name, place, stamp in _members(archive):
                    if is_image_name(name):
                        place = [archive.name, *place]
                        yield Entry(f"{archive.name}/{name}", place, stamp=stamp)
                    elif is_label_name(name):
                        labels.append(f"{archive.name}/{name}")
            except _DAMAGED as error:
                raise UsageError(
                    f"{archive}: the archive is cut off or damaged: {error}. Copy it again, or "
                    f"unpack what can be read and prepare that."
                ) from error

        if labels:
            self.notes.append(f"{labels_not_read(self.address, labels)}, on the unpacked files")

    def read(self, entry: Entry) -> RawImage:
        archive, *place = entry.place
        path = self.path / archive if self.path.is_dir() else self.path
        if path.suffix.lower() == ".zip":
            try:
                opened = _open_zip(path, os.getpid())
                info = opened.getinfo(place[0])
                with _open_member(opened, info) as member:
                    return RawImage(read_whole(member, self.options.max_bytes, info.file_size))
            except (RuntimeError, NotImplementedError, *_UNREADABLE) as error:
                raise RunError(f"the zip archive cannot be read: {error}") from error
        offset, size = place
        require_size(size, self.options.max_bytes)
        plain = path if path.name.lower().endswith(".tar") else self._unpacked(path)
        with plain.open("rb") as file:
            file.seek(offset)
            return RawImage(file.read(size))

    def _unpacked(self, path: Path) -> Path:
        plain = self.out / UNFINISHED / "unpacked" / f"{path.name}.tar"
        if not plain.exists():
            plain.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(plain.with_suffix(".lock")):
                if not plain.exists():
                    with _decompressed(path) as packed, atomic_file(plain) as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
        return plain


def _decompressed(path: Path) -> IO[bytes]:
    name = path.name.lower()
    opened: IO[bytes] = next(o for suffix, o in _OPEN.items() if name.endswith(suffix))(path)
    return opened


@lru_cache(maxsize=4)
def _open_zip(path: Path, _process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextmanager
def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Readable]:
    """A member of a zip, of which no more is unpacked than is read.

    zipfile unpacks at once all that it takes from the disk for one call: a kilobyte of bzip2 can
    become a gigabyte, and one of LZMA seven megabytes.
    """
    if info.compress_type == zipfile.ZIP_BZIP2:
        packed = copy(info)
        packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
        del packed.CRC  # of what it holds; bzip2 has checksums of its own
        with archive.open(packed) as stored, bz2.open(stored) as member:
            yield member
    elif info.compress_type == zipfile.ZIP_LZMA:
        with archive.open(info) as member:
            yield _InPieces(member)
    else:
        with archive.open(info) as member:
            yield member


class _InPieces:
    """A file of which each call reads little."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, 4096))


def _members(archive: Path) -> Iterator[tuple[str, list[Any], str]]:
    """Yield name, place (what `read` needs) and stamp of each file in an archive."""
    name = archive.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    yield info.filename, [info.filename], f"{info.file_size}:{info.CRC:08x}"
        return
    with (
        archive.open("rb") if name.endswith(".tar") else _decompressed(archive) as file,
        tarfile.open(fileobj=file, mode="r:" if name.endswith(".tar") else "r|") as tar,
    ):
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
            if member.isfile():
                place: list[Any] = [member.offset_data, member.size]
                yield member.name, place, f"{member.size}:{member.mtime}"
