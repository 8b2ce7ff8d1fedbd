"""Sets of shards: tars with an index each (`shard_files`), under one manifest.

    OUT/train-000000.tar         <key>.jpg, <key>.json, with labels also <key>.boxes.json
    OUT/train-000000.index.json  key, offset and length of every member: random access
    OUT/manifest.json            splits, shards with sample count, bytes, sha256; skipped; recipe
    OUT/skipped.jsonl            one line per file left out: path, reason
    OUT/notes.jsonl              one line per label left out or in doubt, if any

The manifest is written last and marks the set as whole. Shards that dupr did not write (no
manifest, no index) are indexed by one scan when they are opened. docs/formats.md describes every
field.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.files import leads_outside, write_bytes, write_json
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.remote import (
    AbsentError,
    cache_folder,
    fetch,
    fetch_bytes,
    is_remote,
    once,
)
from dupr_cli.artifacts.shard_files import (
    Place,
    Sample,
    ShardIndex,
    index_path,
    sample_from_json,
    scan_tar,
)
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import ParseError, parse_json, read_limited, validated

# 2: images may keep their channels. Sets of RGB are still written as 1, which means the same.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
NOTES = "notes.jsonl"
_LEAST_SAMPLE = 1024  # bytes of the smallest sample in a tar: a header, and a block of content
_MOST_BYTES = 1 << 44  # of one shard; with it, sums over a set stay far below 64 bits
_PROBED_SAMPLES = 20
# Marks an output folder whose shards are still being written, and holds the working files.
UNFINISHED = ".prepare"


@dataclass(frozen=True)
class Skipped:
    """A file of the source that was left out of the shards, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest."""

    file: str
    samples: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: str

    def require_plausible(self) -> None:
        """Raises ParseError for a name outside the manifest's folder, or more samples than fit.

        The name may be that of a local file to read, or to write into the cache.
        """
        if leads_outside(self.file):
            raise ParseError(
                f"the shard {self.file!r} would lie outside the folder of the manifest"
            )
        if self.samples > self.bytes // _LEAST_SAMPLE or self.bytes > _MOST_BYTES:
            raise ParseError(
                f"{self.file} cannot hold {self.samples} samples in {self.bytes} bytes"
            )


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the content of a finished set of shards.

    pixels: of images that keep their channels and depth; None, and not written, for RGB.
    """

    splits: dict[str, list[ShardEntry]]
    classes: list[str]
    skipped: int
    skip_reasons: dict[str, int]
    source: str
    recipe: dict[str, object]
    fingerprint: str
    dupr_version: str
    format_version: int = 1
    pixels: PixelFormat | None = None

    def write(self, folder: Path) -> None:
        values = asdict(self)
        del values["pixels"]
        if self.pixels is not None:
            values |= {"format_version": FORMAT_VERSION, "pixels": self.pixels.to_json()}
        write_json(folder / MANIFEST, values)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises UsageError when the file is damaged, VersionError for a later format."""
        path = folder / MANIFEST
        try:
            return cls.parse(read_limited(path), str(path))
        except (OSError, ParseError) as error:
            raise _not_whole(path, error) from error

    @classmethod
    def parse(cls, data: bytes, place: str) -> Manifest:
        """Like `read`, for the bytes that were read at `place`."""
        try:
            values = parse_record(data, FORMAT_VERSION, place)
            stated = values.pop("pixels", None)
            pixels = PixelFormat.from_json(stated)
            if stated is not None and pixels is None:  # never to be read as RGB
                raise ParseError(f"its pixels are {stated}")
            manifest = validated(cls, {**values, "pixels": pixels})
            for entries in manifest.splits.values():
                for entry in entries:
                    entry.require_plausible()
        except ParseError as error:
            raise _not_whole(place, error) from error
        return manifest

    @property
    def samples(self) -> int:
        return sum(entry.samples for entries in self.splits.values() for entry in entries)


def _not_whole(place: Path | str, error: Exception) -> UsageError:
    return UsageError(
        f"{place} is not a whole manifest ({error}). Restore it, or run `dupr prepare` again with "
        f"--overwrite."
    )


@dataclass(frozen=True)
class RemoteShard:
    """The origin of a shard in the cache. bytes, sha256: from the manifest."""

    address: str
    bytes: int
    sha256: str | None = None

    def fetch(self, tar: Path) -> None:
        """Copy the shard to its place in the cache. Raises RunError."""
        try:
            fetch(self.address, tar, self.bytes, self.sha256)
        except AbsentError as error:
            raise RunError(
                f"{error}. The shard is missing at the address of the others. Put it back, then "
                f"give the same command again to continue."
            ) from error

    def fetch_index(self, tar: Path) -> None:
        """Copy the shard's index, or index the shard if it has none. Raises RunError."""

        def make() -> None:
            index = self._remote_index()
            if index is None:
                self.fetch(tar)
                index = scan_tar(tar, public_address(self.address))
            index.write(index_path(tar))

        once(index_path(tar), make)

    def _remote_index(self) -> ShardIndex | None:
        """The index beside the remote shard, or None if it is missing or not that of this shard."""
        address = self.address.removesuffix(".tar") + ".index.json"
        try:
            data = fetch_bytes(address)
        except AbsentError:
            return None
        try:
            index = ShardIndex.parse(data, public_address(address))
        except ParseError:  # some servers answer 200 with an HTML page
            return None
        return index if (index.bytes, index.sha256) == (self.bytes, self.sha256) else None


class DamagedSampleError(RunError):
    """One sample cannot be used; its shard is whole, so that others can."""


class ShardSet:
    """Samples of one split, by number: random access over any number of shards.

    An index is read when its shard is first used, so opening a thousand shards costs no more than
    opening one. The set can be passed to worker processes: each opens its own files.
    """

    # Number of indexes kept in memory; sequential reading needs few.
    cached_indexes = 1 << 20

    def __init__(
        self,
        shards: Sequence[Path],
        counts: Sequence[int],
        name: str,
        remote: Sequence[RemoteShard] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """remote: the origin of each shard, if `shards` are paths in a cache. sizes: the bytes of
        each, if its index must be of a tar of that size with as many samples as `counts` says.
        """
        self.shards = list(shards)
        self.counts = list(counts)
        self.name = name
        self._remote = list(remote) if remote is not None else None
        self._sizes = list(sizes) if sizes is not None else None
        self._starts = [sum(counts[:i]) for i in range(len(counts))]
        self._indexes: dict[int, ShardIndex] = {}
        self._files: dict[int, int] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def pixels(self) -> PixelFormat | None:
        """Channels and range of images that keep them, None for RGB: by the manifest, or, without
        one, of the first sample whose JSON is whole. Raises RunError when many have none."""
        problem = None
        for number in range(min(_PROBED_SAMPLES, len(self))):
            try:
                return self.described(number).pixels
            except DamagedSampleError as error:
                problem = problem or error
        raise problem or RunError(f"{self.name}: the shards hold no images.")

    def identity(self) -> str:
        """sha256 over name, size and sample count of each shard; copies have the same identity."""
        digest = hashlib.sha256()
        for shard, (path, count) in enumerate(zip(self.shards, self.counts, strict=True)):
            size = self._remote[shard].bytes if self._remote else path.stat().st_size
            digest.update(f"{path.name} {size} {count}\n".encode())
        if self.pixels is not None:  # the same bytes in another range are other images
            digest.update(f"{self.pixels}\n".encode())
        return digest.hexdigest()

    def remote_of(self, shard: int) -> list[RemoteShard] | None:
        """The origin of one shard, as for a set of this shard alone; None if shards are local."""
        return self._remote and [self._remote[shard]]

    def index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            while len(self._indexes) >= self.cached_indexes:
                del self._indexes[next(iter(self._indexes))]
            tar = self.shards[shard]
            if self._remote:
                self._remote[shard].fetch_index(tar)
            index = _local_index(tar)
            if self._sizes is not None:
                _require_index_of(tar, index, self._sizes[shard], self.counts[shard])
            self._indexes[shard] = index
        return self._indexes[shard]

    def require_indexes(self) -> None:
        """Read the index of every shard of this machine; those of remote shards are not fetched.

        Raises RunError as `index` does.
        """
        for shard in range(len(self.shards)):
            if not self._remote:
                self.index(shard)

    def keys(self) -> Iterator[str]:
        for shard in range(len(self.shards)):
            yield from self.index(shard).keys

    def place(self, number: int) -> tuple[int, int]:
        """(shard, position in the shard) of a sample number."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._starts, number) - 1
        # An empty shard has the same start as the next one; bisect finds the last of them.
        return shard, number - self._starts[shard]

    def _read(self, shard: int, place: Place, key: str) -> bytes:
        if self._owner != os.getpid():
            self._files, self._owner = {}, os.getpid()
        path = self.shards[shard]
        if self._remote and shard not in self._files:
            self._remote[shard].fetch(path)
        try:
            if shard not in self._files:
                if len(self._files) >= 64:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[shard], place[1], place[0])
        except OSError as error:
            raise RunError(
                f"{path}: sample {key} cannot be read: {error.strerror}. Put the shard back, then "
                f"give the same command again to continue."
            ) from error
        if len(data) != place[1]:
            raise RunError(
                f"{path}: the shard is cut off at sample {key}: it has {len(data)} of {place[1]} "
                f"bytes. Copy it again or run `dupr prepare` again."
            )
        return data

    def __getitem__(self, number: int) -> Sample:
        """A sample without its extras.

        Raises DamagedSampleError when it is damaged, another RunError when its shard is.
        """
        return self._sample(number, extras=False)

    def whole(self, number: int) -> Sample:
        """A sample with its extras. Raises RunError when its shard is damaged."""
        return self._sample(number, extras=True)

    def bytes_of(self, number: int) -> int:
        """The size of a sample, with its extras, which is not read."""
        shard, position = self.place(number)
        index = self.index(shard)
        named = (column[position] for column in (index.images, index.infos, index.boxes))
        others = index.extras.get(index.keys[position], {}).values()
        return sum(place[1] for place in (*named, *others) if place is not None)

    def described(self, number: int) -> Sample:
        """A sample with its extras but an empty image: gives labels without reading pixels.

        Raises RunError when its shard is damaged.
        """
        return self._sample(number, extras=True, image=False)

    def _sample(self, number: int, extras: bool, image: bool = True) -> Sample:
        shard, position = self.place(number)
        index = self.index(shard)
        key = index.keys[position]

        def member(place: Place | None) -> bytes | None:
            return None if place is None else self._read(shard, place, key)

        pixels = member(index.images[position]) if image else b""
        info, boxes = (member(column[position]) for column in (index.infos, index.boxes))
        others = index.extras.get(key, {}) if extras else {}
        try:
            return sample_from_json(
                key,
                index.extensions[position],
                pixels or b"",
                parse_json(info) if info else None,
                parse_json(boxes) if boxes else None,
                {suffix: self._read(shard, place, key) for suffix, place in others.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedSampleError(
                f"{self.shards[shard]}: the JSON of sample {key} is damaged ({error})."
            ) from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}


def open_shards(address: str, split: str | None = None) -> ShardSet:
    """Open the shards of a folder, a tar, or a brace pattern such as train-{000000..000009}.tar.

    All three may be remote (http://, https://, or any scheme of fsspec, such as s3://); shards are
    then copied into a cache when they are first read (`dupr_cli.artifacts.remote`).
    split: a split of the manifest; ignored for shards without a manifest, which have no splits.
    Raises UsageError when the shards do not exist, the split is unknown, or the length of a shard
    differs from the manifest.
    """
    if is_remote(address):
        return _open_remote(address, split)
    folder = Path(address)
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            return _open_manifest(folder, split)
        if (folder / UNFINISHED).is_dir():
            raise UsageError(
                f"{folder}: `dupr prepare` did not finish here. Give the same prepare command "
                f"again to continue where it stopped."
            )
        tars = sorted(tar for tar in folder.glob("*.tar") if tar.is_file())
        if not tars:
            raise UsageError(
                f"{folder} holds no shards (no {MANIFEST}, no .tar). If it holds images, `dupr "
                f"prepare {folder} SHARDS` makes shards from them; give SHARDS here."
            )
    else:
        # Imported only here because it imports torch, which prepare does not need.
        from webdataset.shardlists import expand_urls

        tars = [Path(url) for url in expand_urls(address)]
        missing = [tar for tar in tars if not tar.is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(f"{missing[0]}: the shard does not exist{more}.")
    indexes = [_local_index(tar) for tar in tars]
    for tar, index in zip(tars, indexes, strict=True):
        _require_index_of(tar, index, tar.stat().st_size, len(index))
    opened = ShardSet(tars, [len(index) for index in indexes], str(address))
    opened._indexes = dict(enumerate(indexes))
    return _with_images(opened)


def _local_index(tar: Path) -> ShardIndex:
    """The index beside a tar, or that of its scan. Raises RunError when either is damaged."""
    beside = index_path(tar)
    return ShardIndex.read(beside) if beside.exists() else scan_tar(tar)


def _require_index_of(tar: Path, index: ShardIndex, size: int, samples: int) -> None:
    """Raises RunError unless the index is of a tar of so many bytes and samples."""
    if index.bytes != size:
        raise RunError(
            f"{index_path(tar)}: the index is of a tar of {index.bytes} bytes, but {tar.name} has "
            f"{size}. Copy both again. If only the index is wrong, delete it; the shard is then "
            f"scanned when it is opened."
        )
    if len(index) != samples:
        raise RunError(
            f"{index_path(tar)}: the index has {len(index)} samples, {samples} by the manifest. "
            f"Copy both again, or run `dupr prepare` again with --overwrite."
        )


def _with_images(opened: ShardSet) -> ShardSet:
    if not len(opened):
        raise UsageError(f"{opened.name}: the shards hold no images (members such as <key>.jpg).")
    return opened


def _entries(manifest: Manifest, split: str | None, address: str) -> list[ShardEntry]:
    splits = manifest.splits
    if split is None:
        return [entry for listed in splits.values() for entry in listed]
    if split not in splits:
        raise UsageError(f"{address} has no split {split!r}; its splits are {', '.join(splits)}.")
    return splits[split]


def _open_remote(address: str, split: str | None) -> ShardSet:
    if not address.endswith(".tar"):
        return _open_remote_folder(address.rstrip("/"), split)
    from webdataset.shardlists import expand_urls

    remote, tars, counts = [], [], []
    for url in expand_urls(address):
        folder, _, name = url.rpartition("/")
        tar = cache_folder(folder) / name
        index = _index_of_copy(url, tar)
        tars.append(tar)
        counts.append(len(index))
        remote.append(RemoteShard(url, index.bytes))
    return _with_images(ShardSet(tars, counts, public_address(address), remote))


def _index_of_copy(address: str, tar: Path) -> ShardIndex:
    """The index of a remote tar without a manifest; the tar is copied and scanned once."""
    beside = index_path(tar)

    def make() -> None:
        fetch(address, tar)
        try:
            scan_tar(tar, public_address(address)).write(beside)
        except RunError:
            tar.unlink()  # this copy would otherwise be used even after the shard is repaired
            raise

    try:
        once(beside, make)
    except AbsentError as error:
        raise UsageError(f"{error}. The shard does not exist.") from error
    return ShardIndex.read(beside)


def _open_remote_folder(address: str, split: str | None) -> ShardSet:
    public = public_address(address)
    try:
        data = fetch_bytes(f"{address}/{MANIFEST}")
    except AbsentError as error:
        raise UsageError(
            f"{error}. An address of shards must have a {MANIFEST}, which `dupr prepare` writes. "
            f"For shards without one, give a pattern such as "
            f"{public}/train-{{000000..000009}}.tar."
        ) from error
    manifest = Manifest.parse(data, f"{public}/{MANIFEST}")
    entries = _entries(manifest, split, public)
    # Another manifest at the same address is another set.
    cache = cache_folder(f"{address}/{hashlib.sha256(data).hexdigest()[:12]}")
    once(cache / MANIFEST, lambda: write_bytes(cache / MANIFEST, data))
    opened = ShardSet(
        [cache / entry.file for entry in entries],
        [entry.samples for entry in entries],
        f"{public}:{split}" if split else public,
        [RemoteShard(f"{address}/{e.file}", e.bytes, e.sha256) for e in entries],
        [entry.bytes for entry in entries],
    )
    opened.pixels = manifest.pixels
    return opened


def _open_manifest(folder: Path, split: str | None) -> ShardSet:
    manifest = Manifest.read(folder)
    entries = _entries(manifest, split, str(folder))
    for entry in entries:
        path = folder / entry.file
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"is cut off or changed: {size} bytes"
            raise UsageError(
                f"{path} {found}, {entry.bytes} bytes by the manifest. Copy it again, or run "
                f"`dupr prepare` again with --overwrite."
            )
    name = f"{folder}:{split}" if split else str(folder)
    opened = ShardSet(
        [folder / entry.file for entry in entries],
        [entry.samples for entry in entries],
        name,
        sizes=[entry.bytes for entry in entries],
    )
    opened.pixels = manifest.pixels
    return opened
