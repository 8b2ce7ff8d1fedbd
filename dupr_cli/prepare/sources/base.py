"""The protocol of a source: it lists its images, and reads one of them.

A source lists its images in an order that depends only on its contents, one `Entry` at a time, so
that memory suffices for a hundred million. An entry is plain data: it is written to a file, and a
worker that creates its own instance of the source reads the image from it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dupr_cli.addresses import public_address, split_user
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.reading import read_regular
from dupr_cli.datasets.placement import Labels, Size
from dupr_cli.outside_text import tar_key
from dupr_cli.recipe.prepare import SourceSection


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, not read yet.

    name: its path or address within the source; what people see and the set keeps of an address is
    its public form. place: what `read` needs, as a JSON
    value. key: of the sample; derived from the name by default. stamp: differs when the image or
    its labels change, without reading them; see `stamp_of`.
    """

    name: str
    place: Any = None
    split: str = "train"
    key: str = ""
    stamp: str = ""

    @property
    def sample_key(self) -> str:
        return self.key or key_of(self.name)

    @property
    def split_key(self) -> str:
        """What decides whether the image is held out: as ever, also for addresses with a query."""
        whole = split_user(self.name)[0]
        return self.key or _keyed(whole, whole)


def stamp_of(*files: Path) -> str:
    """Size and modification time of the files that an image and its labels are read from."""
    stamps = []
    for path in files:
        try:
            found = path.stat()
            stamps.append(f"{found.st_size}:{found.st_mtime_ns}")
        except (OSError, ValueError):  # ValueError: a name that no file can have
            stamps.append("-")
    return ",".join(stamps)


def key_of(name: str) -> str:
    """A key for a file of this name: it is unique, and WebDataset needs no change to it."""
    public = public_address(name)
    return _keyed(name if public == name else public.partition("?")[0], public)


def _keyed(path: str, identity: str) -> str:
    stem = re.sub(r"[^\w-]", "_", PurePosixPath(path).stem, flags=re.ASCII)[:100]
    return f"{stem}-{hashlib.sha256(name_bytes(identity)).hexdigest()[:10]}"


def name_bytes(name: str) -> bytes:
    """The bytes of a name; one out of JSON may hold halves of pairs, which no file's name has."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def plain_key(name: str) -> str:
    """A key that is the name itself, for sources that guarantee unique names."""
    return tar_key(name.replace("/", "_").replace(".", "_"))


def separate_splits(entries: Iterable[Entry], notes: list[str]) -> Iterator[Entry]:
    """Give an entry another key when an earlier split already has its key: splits may overlap,
    whereas a key that repeats within a split marks an image that is listed twice.

    Appends the number of images that two splits share to `notes`.
    """
    first: dict[int, tuple[str, int]] = {}
    again: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        mine = (entry.split, hash(entry.name))
        before, name = first.setdefault(hash(entry.sample_key), mine)
        if before != entry.split:
            again[before, entry.split] += name == mine[1]
            entry = replace(entry, key=f"{entry.split}-{entry.sample_key}")
        yield entry
    notes += [
        f"{count} images of the split {later} are also in {before} and stay in both"
        for (before, later), count in again.items()
        if count
    ]


@dataclass(frozen=True)
class RawImage:
    """An image as the source has it.

    boxes: None if the source has no labels; in pixels of the stored image or, if `upright`, of the
    image after its EXIF orientation is applied. unit: boxes are fractions of width and height.
    size: (width, height) that the labels were made for, if the source says so. left_out, remarks:
    as in `Labels`. label: class of the whole image. source: where the image originally came from,
    if not from this source. info, extras: see `Sample`. mask: (height, width) class numbers of the
    stored or the upright image, whose names `info` has as MASK_CLASSES. pixels: of an image whose
    channels and values are kept by the shards that it comes from.
    """

    data: bytes
    boxes: tuple[Box, ...] | None = None
    upright: bool = False
    unit: bool = False
    size: Size | None = None
    label: str | None = None
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    pixels: PixelFormat | None = None
    mask: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, data: bytes, labels: Labels | None) -> RawImage:
        """An image with the labels that a reader of `datasets` gives, None for no labels."""
        return cls(data) if labels is None else cls(data, **vars(labels))

    @property
    def labels(self) -> Labels | None:
        if self.boxes is None:
            return None
        return Labels(self.boxes, self.size, self.upright, self.unit, self.left_out, self.remarks)


def labels_not_read(address: str, found: Sequence[str]) -> str:
    """The note on files that look like labels in a source that takes images only."""
    return (
        f"{address}: {len(found)} label files were not read; the first is {found[0]}. Their layout "
        f"was not recognised, so the images are taken without labels. Lay them out as VOC, COCO or "
        f"YOLO, or name the layout with --set source.kind=voc, coco or yolo"
    )


class ImageSource(Protocol):
    """A source of images. Creating one costs nothing, since every worker creates its own.

    Another package registers a source class in the entry point group `dupr.sources`.
    """

    # Whether images have boxes: then duplicates are kept unless the recipe says otherwise.
    labelled: bool
    # Whether reading waits for a server rather than for this machine.
    remote: bool
    # Notes on the source as a whole for the user, complete once all entries have been listed.
    notes: list[str]

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        """address: as given to `dupr prepare`. out: folder of shards, not part of the source."""

    def entries(self) -> Iterator[Entry]:
        """All images, in a fixed order; those of one split need not be adjacent.

        Raises UsageError when the source does not have the expected layout.
        """
        ...

    def read(self, entry: Entry) -> RawImage:
        """One image. Raises OSError or DuprError when it or its labels cannot be used."""
        ...


class BuiltIn(ImageSource):
    """A source that is also recognised from its contents."""

    labelled = False
    remote = False

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        self.address, self.options, self.out = address, options, out
        self.notes = []
        self.path = Path(address)

    def read_file(self, path: Path) -> bytes:
        """The content of an image on this machine, within the limits of the recipe.

        Raises OSError, or UnfitImageError if it is not a regular file or too large.
        """
        return read_regular(path, self.options.max_bytes)

    @classmethod
    def recognises(cls, address: str) -> bool:
        """Whether an address that exists is of this kind."""
        raise NotImplementedError
