"""Shards: plain WebDataset tars, each with an index beside it, under one manifest.

    OUT/train-000000.tar         <key>.jpg, <key>.json, with labels also <key>.boxes.json
    OUT/train-000000.index.json  key, offset and length of every member: random access
    OUT/manifest.json            splits, shards with sample count, bytes, sha256; skipped; recipe
    OUT/skipped.jsonl            one line per file left out: path, reason

An index is written after its tar has its final name, so it also marks the shard as whole; the
manifest is written last and marks the set as whole. Tars hold no times, users or modes of the
machine: the same samples give the same bytes. Shards that dupr did not write (no manifest, no
index) are indexed by one scan when they are opened. docs/formats.md has every field.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from dupr_cli.artifacts.files import fsync_directory, naming, write_bytes, write_json, write_text
from dupr_cli.artifacts.remote import (
    AbsentError,
    cache_folder,
    fetch,
    fetch_bytes,
    is_remote,
    once,
)
from dupr_cli.errors import RunError, UsageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Box:
    """One labelled object. x_min, y_min, x_max, y_max: pixel edges, 0-based, half-open."""

    name: str
    x_min: float
    y_min: float
    x_max: float
    y_max: float
    difficult: bool = False
    truncated: bool = False
    crowd: bool = False

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return (self.x_min, self.y_min, self.x_max, self.y_max)

    def upright(self, orientation: int, width: int, height: int) -> Box:
        """The box after the image is turned upright.

        orientation: EXIF tag 274, 1 to 8. width, height: of the image as stored, pixels.
        Source: EXIF 2.3, tag Orientation.
        """
        xs, ys = (self.x_min, self.x_max), (self.y_min, self.y_max)
        mirrored = (width - self.x_max, width - self.x_min)
        upended = (height - self.y_max, height - self.y_min)
        turned = {
            2: (mirrored, ys),
            3: (mirrored, upended),
            4: (xs, upended),
            5: (ys, xs),
            6: (upended, xs),
            7: (upended, mirrored),
            8: (ys, mirrored),
        }
        (x_min, x_max), (y_min, y_max) = turned.get(orientation, (xs, ys))
        return replace(self, x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max)


@dataclass(frozen=True)
class Sample:
    """One image of a shard, not decoded. boxes is None where the source had no labels."""

    key: str
    extension: str
    image: bytes
    source: str = ""
    width: int = 0
    height: int = 0
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True)
class Skipped:
    """A source file that was left out of the shards, and why."""

    path: str
    reason: str


@dataclass
class ShardIndex:
    """Where each sample of one shard lies: byte offset and length of its members in the tar.

    source_end: items of the source that were used up when the shard was full (0 for a scan).
    skipped: files left out on the way. classes: names of the objects in it.
    """

    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    infos: list[tuple[int, int] | None] = field(default_factory=list)
    boxes: list[tuple[int, int] | None] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    source_end: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Raises RunError when the file is not a whole index."""
        try:
            return _parse_index(path.read_bytes())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} is not a whole shard index ({error}). Delete it: the shard is then "
                f"scanned when it is opened."
            ) from error

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), separators=(",", ":")) + "\n")


def _parse_index(data: bytes) -> ShardIndex:
    """Raises ValueError, TypeError or KeyError when the data are not a whole index."""
    values = json.loads(data)
    index = ShardIndex(**values)
    index.skipped = [Skipped(**entry) for entry in values["skipped"]]
    return index


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.json")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


class _HashingFile:
    """A file being written from start to end, its sha256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.length += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.length

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class ShardWriter:
    """Writes one shard, sample by sample; the tar and its index appear only when whole.

    Without samples there is no tar: only an index, which records what was skipped.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._index = path, ShardIndex()
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._index)

    def _open(self) -> None:
        self._file = self._temporary.open("wb")
        self._hashing = _HashingFile(self._file)
        self._tar = tarfile.open(  # noqa: SIM115
            fileobj=cast(BinaryIO, self._hashing), mode="w", format=tarfile.PAX_FORMAT
        )

    def _append(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)  # no time, user or mode of this machine
        info.size, info.mode = len(data), 0o644
        with naming(self._path):
            self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._hashing.length - padded, len(data)

    def add(self, sample: Sample) -> None:
        if self._file is None:
            self._open()
        index = self._index
        info = {
            "source": sample.source,
            "width": sample.width,
            "height": sample.height,
            "sha256": hashlib.sha256(sample.image).hexdigest(),
        }
        index.keys.append(sample.key)
        index.extensions.append(sample.extension)
        index.images.append(self._append(f"{sample.key}.{sample.extension}", sample.image))
        index.infos.append(self._append(f"{sample.key}.json", _json(info)))
        if sample.boxes is None:
            index.boxes.append(None)
        else:
            objects = {"objects": [_box_to_json(box) for box in sample.boxes]}
            index.boxes.append(self._append(f"{sample.key}.boxes.json", _json(objects)))
            index.classes = sorted({*index.classes, *(box.name for box in sample.boxes)})

    def finish(self, source_end: int, skipped: Sequence[Skipped]) -> ShardIndex:
        """Give tar and index their names. source_end, skipped: see ShardIndex."""
        index = self._index
        index.source_end, index.skipped = source_end, list(skipped)
        if self._file is not None:
            with naming(self._path):
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            index.bytes, index.sha256 = self._hashing.length, self._hashing.sha256
            self._temporary.replace(self._path)
            fsync_directory(self._path.parent)
        index.write(index_path(self._path))
        return index

    def abandon(self) -> None:
        """Leave no trace of an unfinished shard."""
        self._temporary.unlink(missing_ok=True)
        if self._file is not None:
            with suppress(OSError):  # what is still buffered does not fit either
                self._file.close()


def write_shard(
    path: Path, samples: Sequence[Sample], source_end: int = 0, skipped: Sequence[Skipped] = ()
) -> ShardIndex:
    """Write one shard of samples that are all at hand, and its index."""
    writer = ShardWriter(path)
    try:
        for sample in samples:
            writer.add(sample)
        return writer.finish(source_end, skipped)
    except BaseException:
        writer.abandon()
        raise


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _box_to_json(box: Box) -> dict[str, object]:
    return {
        "class": box.name,
        "box": list(box.corners),
        "difficult": box.difficult,
        "truncated": box.truncated,
        "crowd": box.crowd,
    }


def _box_from_json(value: dict[str, object]) -> Box:
    x_min, y_min, x_max, y_max = (float(v) for v in cast(list[float], value["box"]))
    flags = {flag: bool(value.get(flag, False)) for flag in ("difficult", "truncated", "crowd")}
    return Box(str(value["class"]), x_min, y_min, x_max, y_max, **flags)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what a finished set of shards holds."""

    splits: dict[str, list[ShardEntry]]
    classes: list[str]
    skipped: int
    skip_reasons: dict[str, int]
    source: str
    recipe: dict[str, object]
    fingerprint: str
    dupr_version: str
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises UsageError when the file is damaged or of a later format."""
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise _not_whole(path, error) from error

    @classmethod
    def parse(cls, data: bytes, place: str) -> Manifest:
        """As `read`, of what was read at `place`."""
        try:
            values = json.loads(data)
            if values["format_version"] > FORMAT_VERSION:
                raise UsageError(
                    f"{place}: the shards have format version {values['format_version']}, this "
                    f"dupr reads up to {FORMAT_VERSION}. Update dupr."
                )
            splits = {
                name: [ShardEntry(**entry) for entry in entries]
                for name, entries in values.pop("splits").items()
            }
            return cls(splits=splits, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _not_whole(place, error) from error

    @property
    def samples(self) -> int:
        return sum(entry.samples for entries in self.splits.values() for entry in entries)


def _not_whole(place: Path | str, error: Exception) -> UsageError:
    return UsageError(f"{place} is not a whole manifest ({error}). Run `dupr prepare` again.")


def write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in skipped]
    write_text(folder / SKIPPED, "".join(line + "\n" for line in lines))


def scan_tar(path: Path, address: str | None = None) -> ShardIndex:
    """Index a tar that came without one. Raises RunError naming the sample where it breaks off.

    address: where the tar was copied from, for the message.
    """
    index = ShardIndex(bytes=path.stat().st_size)
    by_key: dict[str, int] = {}
    last = "its start"
    try:
        with tarfile.open(path, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = (f"{folder}/{stem}" if folder else stem), suffix.lower()
                place = (member.offset_data, member.size)
                if member.offset_data + member.size > index.bytes:
                    raise tarfile.ReadError("unexpected end of data")
                if suffix in IMAGE_EXTENSIONS and key not in by_key:
                    by_key[key] = len(index.keys)
                    index.keys.append(key)
                    index.extensions.append(suffix)
                    index.images.append(place)
                    index.infos.append(None)
                    index.boxes.append(None)
                elif suffix == "boxes.json" and key in by_key:
                    index.boxes[by_key[key]] = place
                elif suffix == "json" and key in by_key:
                    index.infos[by_key[key]] = place
                last = f"member {member.name}"
    except (tarfile.TarError, EOFError) as error:
        raise RunError(
            f"{address or path}: the shard is cut off or damaged after {last}: {error}. "
            f"Copy it again or make it anew."
        ) from error
    return index


@dataclass(frozen=True)
class RemoteShard:
    """Where a shard in the cache comes from. bytes, sha256: what the manifest says."""

    address: str
    bytes: int
    sha256: str | None = None

    def fetch(self, tar: Path) -> None:
        """Copy the shard to its place in the cache. Raises RunError."""
        try:
            fetch(self.address, tar, self.bytes, self.sha256)
        except AbsentError as error:
            raise RunError(
                f"{error}. The shard is gone from where the others are. Put it back, and give the "
                f"same command again; it goes on."
            ) from error

    def fetch_index(self, tar: Path) -> None:
        """Copy the shard's index, or make one of the shard where it has none. Raises RunError."""

        def make() -> None:
            index = self._index_there()
            if index is None:
                self.fetch(tar)
                index = scan_tar(tar, self.address)
            index.write(index_path(tar))

        once(index_path(tar), make)

    def _index_there(self) -> ShardIndex | None:
        """The index that lies beside the shard, if it is one and of this very shard."""
        try:
            data = fetch_bytes(self.address.removesuffix(".tar") + ".index.json")
        except AbsentError:
            return None
        try:
            index = _parse_index(data)
        except (ValueError, TypeError, KeyError):  # some servers answer 200 with a page
            return None
        return index if (index.bytes, index.sha256) == (self.bytes, self.sha256) else None


class ShardSet:
    """Samples of one split, by number: random access over any number of shards.

    Indexes are read when a shard is first touched, so that opening costs the same for one shard
    and for a thousand. Safe to pass to worker processes: each opens its own files.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        counts: Sequence[int],
        name: str,
        remote: Sequence[RemoteShard] | None = None,
    ) -> None:
        """remote: where each shard comes from, when `shards` are places in a cache."""
        self.shards = list(shards)
        self.counts = list(counts)
        self.name = name
        self._remote = list(remote) if remote is not None else None
        self._starts = [sum(counts[:i]) for i in range(len(counts))]
        self._indexes: dict[int, ShardIndex] = {}
        self._files: dict[int, int] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return sum(self.counts)

    def identity(self) -> str:
        """sha256 over name, size and sample count of each shard: the same for a copy elsewhere."""
        digest = hashlib.sha256()
        for shard, (path, count) in enumerate(zip(self.shards, self.counts, strict=True)):
            size = self._remote[shard].bytes if self._remote else path.stat().st_size
            digest.update(f"{path.name} {size} {count}\n".encode())
        return digest.hexdigest()

    def index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            tar = self.shards[shard]
            if self._remote:
                self._remote[shard].fetch_index(tar)
            beside = index_path(tar)
            self._indexes[shard] = ShardIndex.read(beside) if beside.exists() else scan_tar(tar)
        return self._indexes[shard]

    def keys(self) -> Iterator[str]:
        for shard in range(len(self.shards)):
            yield from self.index(shard).keys

    def place(self, number: int) -> tuple[int, int]:
        """(shard, position in it) of a sample number."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._starts, number) - 1
        # Empty shards share their start with the next one: bisect lands on the last of them.
        return shard, number - self._starts[shard]

    def _read(self, shard: int, place: tuple[int, int], key: str) -> bytes:
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
                f"{path}: sample {key} cannot be read: {error.strerror}. Put the shard back, and "
                f"give the same command again; it goes on."
            ) from error
        if len(data) != place[1]:
            raise RunError(
                f"{path}: the shard is cut off at sample {key}: {len(data)} of {place[1]} bytes "
                f"are there. Copy it again or run `dupr prepare` again."
            )
        return data

    def __getitem__(self, number: int) -> Sample:
        shard, position = self.place(number)
        index = self.index(shard)
        key = index.keys[position]
        image = self._read(shard, index.images[position], key)
        boxes_at, info_at = index.boxes[position], index.infos[position]
        boxes, info = None, {}
        try:
            if boxes_at is not None:
                objects = json.loads(self._read(shard, boxes_at, key))["objects"]
                boxes = tuple(_box_from_json(value) for value in objects)
            if info_at is not None:
                info = json.loads(self._read(shard, info_at, key))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.shards[shard]}: the JSON of sample {key} is damaged ({error})."
            ) from error
        return Sample(
            key,
            index.extensions[position],
            image,
            source=str(info.get("source", "")),
            width=int(info.get("width", 0)),
            height=int(info.get("height", 0)),
            boxes=boxes,
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}


def is_shard_folder(path: Path) -> bool:
    """Whether a folder holds shards: a manifest, or tars and no loose images beside them."""
    return (path / MANIFEST).is_file() or any(path.glob("*.tar"))


def open_shards(address: str, split: str | None = None) -> ShardSet:
    """Shards at a folder, a tar, or a brace pattern such as data/train-{000000..000009}.tar.

    All three may also be an address (http://, https://, or any that fsspec knows, such as s3://):
    shards are then copied into a cache when they are first read (`dupr_cli.artifacts.remote`).
    split: a split of the manifest; shards without a manifest have no splits and it is ignored.
    Raises UsageError when nothing is there, the split is unknown, or a shard is not as long as
    the manifest says.
    """
    if is_remote(address):
        return _open_remote(address, split)
    folder = Path(address)
    if folder.is_dir():
        if (folder / MANIFEST).is_file():
            return _open_manifest(folder, split)
        if (folder / UNFINISHED).is_file():
            raise UsageError(
                f"{folder}: `dupr prepare` did not finish here. Give the same prepare command "
                f"again; it goes on where it stopped."
            )
        tars = sorted(folder.glob("*.tar"))
        if not tars:
            raise UsageError(
                f"{folder}: no shards here (no {MANIFEST}, no .tar). Make them with "
                f"`dupr prepare IMAGES {folder}`."
            )
    else:
        # Imported where it is needed: it brings torch along, which prepare does without.
        from webdataset.shardlists import expand_urls

        tars = [Path(url) for url in expand_urls(address)]
        missing = [tar for tar in tars if not tar.is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(f"{missing[0]}: there is no such shard{more}.")
    indexes = [
        ShardIndex.read(index_path(tar)) if index_path(tar).exists() else scan_tar(tar)
        for tar in tars
    ]
    opened = ShardSet(tars, [len(index) for index in indexes], str(address))
    opened._indexes = dict(enumerate(indexes))
    return _with_images(opened)


# Marks an output folder whose shards are still being written.
UNFINISHED = ".prepare.json"


def _with_images(opened: ShardSet) -> ShardSet:
    if not len(opened):
        raise UsageError(
            f"{opened.name}: the shards hold no images (members named <key>.jpg, .png or .webp)."
        )
    return opened


def _entries(manifest: Manifest, split: str | None, address: str) -> list[ShardEntry]:
    splits = manifest.splits
    if split is None:
        return [entry for listed in splits.values() for entry in listed]
    if split not in splits:
        raise UsageError(f"{address}: there is no split {split!r}; it has {', '.join(splits)}.")
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
    return _with_images(ShardSet(tars, counts, address, remote))


def _index_of_copy(address: str, tar: Path) -> ShardIndex:
    """Index of a tar of which no manifest tells anything: it is copied and scanned, once."""
    beside = index_path(tar)

    def make() -> None:
        fetch(address, tar)
        try:
            scan_tar(tar, address).write(beside)
        except RunError:
            tar.unlink()  # nothing else would tell this copy from one of the mended shard
            raise

    try:
        once(beside, make)
    except AbsentError as error:
        raise UsageError(f"{error}. There is no such shard.") from error
    return ShardIndex.read(beside)


def _open_remote_folder(address: str, split: str | None) -> ShardSet:
    try:
        data = fetch_bytes(f"{address}/{MANIFEST}")
    except AbsentError as error:
        raise UsageError(
            f"{error}. An address of shards has a {MANIFEST}, which `dupr prepare` writes; for "
            f"shards without one give a pattern such as {address}/train-{{000000..000009}}.tar."
        ) from error
    manifest = Manifest.parse(data, f"{address}/{MANIFEST}")
    entries = _entries(manifest, split, address)
    for entry in entries:
        # Someone else wrote these names, and files of this machine get them.
        name = PurePosixPath(entry.file)
        if not name.name or name.is_absolute() or ".." in name.parts:
            raise UsageError(
                f"{address}/{MANIFEST}: the shard {entry.file!r} would lie outside the folder of "
                f"the manifest. Nothing of it was fetched."
            )
    # Other shards at the same address are another set.
    cache = cache_folder(f"{address}/{hashlib.sha256(data).hexdigest()[:12]}")
    once(cache / MANIFEST, lambda: write_bytes(cache / MANIFEST, data))
    return ShardSet(
        [cache / entry.file for entry in entries],
        [entry.samples for entry in entries],
        f"{address}:{split}" if split else address,
        [RemoteShard(f"{address}/{e.file}", e.bytes, e.sha256) for e in entries],
    )


def _open_manifest(folder: Path, split: str | None) -> ShardSet:
    entries = _entries(Manifest.read(folder), split, str(folder))
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
    return ShardSet([folder / e.file for e in entries], [e.samples for e in entries], name)
