"""One shard: a plain WebDataset tar, and the index beside it for random access.

    train-000000.tar         <key>.jpg, <key>.json, with labels also <key>.boxes.json or
                             <key>.mask.png
    train-000000.index.json  key, offset and length of every member

Tars hold no times, users or modes of the machine, so the same samples give the same bytes. An index
is written after its tar has its final name, so it also marks the shard as whole. A tar that dupr
did not write is indexed by one scan.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field

from dupr_cli.artifacts.files import (
    fsync_directory,
    is_array_name,
    is_image_name,
    naming,
    write_text,
)
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import RunError
from dupr_cli.outside_text import json_text
from dupr_cli.parsing import ParseError, read_limited, validated

FORMAT_VERSION = 1  # of the index
# Fields that dupr writes into <key>.json; all other fields of a source's own <key>.json are kept.
_INFO = ("source", "width", "height", "sha256", "class")
# The member that holds the class number of every pixel, and the field of <key>.json that names the
# classes by number. Without that field, the member is another tool's, and may be anything.
MASK, MASK_CLASSES = "mask.png", "mask_classes"
_PIXELS = "pixels"  # another one, if its value has the form that dupr gives it


@dataclass(frozen=True)
class Sample:
    """One image of a shard, not decoded.

    boxes: None if the source had no labels. label: class of the whole image. info: other fields of
    <key>.json. extras: further members of the sample (txt, cls, ...), by suffix. sha256: of the
    image; if empty, it is computed on writing. pixels, depth: channels, range and bits of an image
    that keeps them, None and 0 if it is read as RGB of 8 bits.
    """

    key: str
    extension: str
    image: bytes
    source: str = ""
    width: int = 0
    height: int = 0
    boxes: tuple[Box, ...] | None = None
    label: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)
    sha256: str = ""
    pixels: PixelFormat | None = None
    depth: int = 0

    def info_json(self) -> dict[str, object]:
        """The content of <key>.json."""
        values: dict[str, object] = {
            "source": self.source,
            "width": self.width,
            "height": self.height,
            "sha256": self.sha256 or hashlib.sha256(self.image).hexdigest(),
        }
        if self.label is not None:
            values["class"] = self.label
        if self.pixels is not None:
            values[_PIXELS] = {**self.pixels.to_json(), "depth": self.depth}
        return {**self.info, **values}


def sample_from_json(
    key: str,
    extension: str,
    image: bytes,
    info: object,
    boxes: object,
    extras: Mapping[str, bytes],
) -> Sample:
    """Make a sample from its members, which another tool may have written.

    info: of <key>.json; a value that is not a JSON object is kept under "json". boxes: of
    <key>.boxes.json. Raises KeyError, TypeError or ValueError when its objects are malformed.
    """
    values = info if isinstance(info, dict) else {} if info is None else {"json": info}
    own = {name: values.get(name) for name in _INFO}
    label = own["class"] if isinstance(own["class"], str) else None
    others = {name: value for name, value in values.items() if name not in _INFO}
    if label is None and own["class"] is not None:
        others["class"] = own["class"]
    stated = values.get(_PIXELS)
    pixels = PixelFormat.from_json(stated)
    if pixels is not None:
        del others[_PIXELS]
    objects = None
    # Other tools may use this name for a member of another form.
    if isinstance(boxes, dict) and isinstance(boxes.get("objects"), list):
        objects = tuple(Box.from_json(value) for value in boxes["objects"])
    return Sample(
        key,
        extension,
        image,
        source=str(own["source"] or ""),
        width=_whole(own["width"]),
        height=_whole(own["height"]),
        boxes=objects,
        label=label,
        info=others,
        extras=extras,
        pixels=pixels,
        depth=_whole(stated.get("depth")) if pixels and isinstance(stated, dict) else 0,
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


Place = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
_Bytes = bytes  # the field `bytes` of ShardIndex hides the built-in


@dataclass
class ShardIndex:
    """Byte offset and length of the members of each sample in one tar.

    extras: by key and suffix, the members other than image, <key>.json and boxes.
    """

    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    images: list[Place] = field(default_factory=list)
    infos: list[Place | None] = field(default_factory=list)
    boxes: list[Place | None] = field(default_factory=list)
    extras: dict[str, dict[str, Place]] = field(default_factory=dict)
    bytes: int = 0
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Raises RunError when the file is not a whole index, VersionError for a later format."""
        try:
            return cls.parse(read_limited(path), path)
        except (OSError, ParseError) as error:
            raise RunError(
                f"{path} is not a whole shard index ({error}). Delete it; the shard is then "
                f"scanned when it is opened."
            ) from error

    @classmethod
    def parse(cls, data: _Bytes, place: Path | str) -> ShardIndex:
        """Raises ParseError when `data` is not a whole index, VersionError for a later format."""
        values = parse_record(data, FORMAT_VERSION, place)
        columns = [column.name for column in fields(cls)]
        for name in columns:
            if name not in values:
                raise ParseError(f"{name} is missing")
        index = validated(cls, {name: values[name] for name in columns})
        index._require_consistent()
        return index

    def _require_consistent(self) -> None:
        """Raises ParseError unless each sample has a value in every column, inside the tar."""
        lengths = [len(c) for c in (self.extensions, self.images, self.infos, self.boxes)]
        if any(length != len(self.keys) for length in lengths):
            raise ParseError(f"it has {len(self.keys)} keys, but columns of {lengths} entries")
        for column in (self.images, self.infos, self.boxes):
            for key, place in zip(self.keys, column, strict=True):
                if place is not None and sum(place) > self.bytes:
                    raise self._outside(key, place)
        for key, members in self.extras.items():
            for place in members.values():
                if sum(place) > self.bytes:
                    raise self._outside(key, place)

    def _outside(self, key: str, place: Place) -> ParseError:
        return ParseError(
            f"a member of sample {key} would be {place[1]} bytes from byte {place[0]} on, outside "
            f"the tar of {self.bytes} bytes"
        )

    def write(self, path: Path) -> None:
        values = {"format_version": FORMAT_VERSION, **vars(self)}
        write_text(path, json.dumps(values, separators=(",", ":")) + "\n")


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.json")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def tar_header(name: str, size: int) -> bytes:
    """The header of a regular file, without time, user or mode of this machine.

    Source: POSIX.1-1988 ustar; names that it cannot hold get a pax header first.
    """
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11 or not name.isascii():
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT)
    start = encoded.ljust(100, b"\0") + b"0000644\x000000000\x000000000\x00%011o\x0000000000000\x00"
    block = (start % size + b" " * 8 + b"0").ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(tarfile.BLOCKSIZE, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _padding(size: int) -> int:
    """Number of bytes from the end of a member of `size` bytes to the next block."""
    return -size % tarfile.BLOCKSIZE


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    """Suffix and content of each member of a sample, in their order in the tar."""
    members = [(sample.extension, sample.image), ("json", _json(sample.info_json()))]
    if sample.boxes is not None:
        objects = {"objects": [box.to_json() for box in sample.boxes]}
        members.append(("boxes.json", _json(objects)))
    return [*members, *sample.extras.items()]


class ShardWriter:
    """Writes one shard, sample by sample; the tar and its index appear only when complete."""

    def __init__(self, path: Path) -> None:
        self.path, self._index = path, ShardIndex()
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file: BinaryIO | None = None
        self._digest, self.bytes = hashlib.sha256(), 0

    def __len__(self) -> int:
        return len(self._index)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def _append(self, name: str, data: bytes) -> Place:
        self._write(tar_header(name, len(data)))
        offset = self.bytes
        self._write(data)
        self._write(bytes(_padding(len(data))))
        return offset, len(data)

    def size_of(self, sample: Sample) -> int:
        """Bytes by which a sample makes the tar longer."""
        members = _members(sample)
        heads = (len(tar_header(f"{sample.key}.{suffix}", len(data))) for suffix, data in members)
        return (
            sum(heads)
            + sum(-(-len(data) // tarfile.BLOCKSIZE) for _, data in members) * tarfile.BLOCKSIZE
        )

    def add(self, sample: Sample) -> None:
        """Append one sample. Raises OSError, naming the shard, when it cannot be written."""
        index, key = self._index, sample.key
        with naming(self.path):
            if self._file is None:
                self._file = self._temporary.open("wb", buffering=1 << 20)
            places = {
                suffix: self._append(f"{key}.{suffix}", data) for suffix, data in _members(sample)
            }
        index.keys.append(key)
        index.extensions.append(sample.extension)
        index.images.append(places.pop(sample.extension))
        index.infos.append(places.pop("json"))
        index.boxes.append(places.pop("boxes.json", None))
        if places:
            index.extras[key] = places

    def finish(self) -> ShardIndex:
        """Give tar and index their final names. Raises OSError like `add`."""
        with naming(self.path):
            if self._file is None:
                self._file = self._temporary.open("wb")
            self._write(bytes(2 * tarfile.BLOCKSIZE))
            self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        index = self._index
        index.bytes, index.sha256 = self.bytes, self._digest.hexdigest()
        self._temporary.replace(self.path)
        fsync_directory(self.path.parent)
        index.write(index_path(self.path))
        return index

    def abandon(self) -> None:
        """Leave no trace of an unfinished shard."""
        self._temporary.unlink(missing_ok=True)
        if self._file is not None:
            with suppress(OSError):  # the buffered rest cannot be written either
                self._file.close()


def write_shard(path: Path, samples: Sequence[Sample]) -> ShardIndex:
    """Write one shard from samples in memory, and its index."""
    writer = ShardWriter(path)
    try:
        for sample in samples:
            writer.add(sample)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _json(value: object) -> bytes:
    return json_text(value, separators=(",", ":")).encode()


def scan_tar(path: Path, address: str | None = None) -> ShardIndex:
    """Index a tar that has no index. Raises RunError that names the last member before the damage.

    address: where the tar was copied from, for the message.
    """
    index = ShardIndex(bytes=path.stat().st_size)
    members: list[tuple[str, Place]] = []
    last = "its start"
    try:
        with tarfile.open(path, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
                if not member.isfile():
                    continue
                if member.offset_data + member.size > index.bytes:
                    raise tarfile.ReadError("unexpected end of data")
                members.append((member.name, (member.offset_data, member.size)))
                last = f"member {member.name}"
    except (tarfile.TarError, EOFError) as error:
        raise RunError(
            f"{address or path}: the shard is cut off or damaged after {last}: {error}. "
            f"Copy it or make it again."
        ) from error
    others: dict[str, dict[str, Place]] = {}
    for key, suffix, place in _samples(members):
        if key not in others:
            others[key] = {}
            index.keys.append(key)
            index.extensions.append(suffix)
            index.images.append(place)
        else:
            others[key][suffix] = place
    for key in index.keys:
        of_key = others[key]
        index.infos.append(of_key.pop("json", None))
        index.boxes.append(of_key.pop("boxes.json", None))
        if of_key:
            index.extras[key] = of_key
    return index


def _samples(members: Sequence[tuple[str, Place]]) -> Iterator[tuple[str, str, Place]]:
    """Key, suffix and place of the members of samples with an image; each image comes first.

    As in WebDataset, a key ends at the first dot of the file's name. If no image has that key, the
    dots belong to the key: a.v1.jpg and a.v2.jpg are two images, whereas beside a.jpg the image
    a.mask.png is a member of the sample a. In a tar without pictures, the arrays are the images.
    """
    images = [(name, place) for name, place in members if is_image_name(name)]
    images = images or [(name, place) for name, place in members if is_array_name(name)]
    plain = {key for name, _ in images for key, suffix in [_first_dot(name)] if "." not in suffix}

    def own_key(name: str) -> tuple[str, str]:
        key, suffix = _first_dot(name)
        if key in plain:
            return key, suffix.lower()
        stem, _, last = name.rpartition(".")
        return stem, last.lower()

    first: dict[str, tuple[str, str, Place]] = {}
    for name, place in images:
        key, suffix = own_key(name)
        if "." not in suffix:
            first.setdefault(key, (name, suffix, place))
    yield from ((key, suffix, place) for key, (_, suffix, place) in first.items())
    taken = {name for name, _, _ in first.values()}
    for name, place in members:
        if name in taken:
            continue
        key, suffix = _first_dot(name)
        while key not in first and "." in suffix:  # a.v1.cls belongs to a.v1.jpg
            part, _, suffix = suffix.partition(".")
            key = f"{key}.{part}"
        if key in first:
            yield key, suffix.lower(), place


def _first_dot(name: str) -> tuple[str, str]:
    """Key and suffix of a member as WebDataset splits its name; folders belong to the key."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix
