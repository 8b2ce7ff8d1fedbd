"""What every source is: a listing of images, and how one of them is read.

A source lists its images in an order that depends on nothing but its contents, one `Entry` at a
time, so that a hundred million fit. An entry is plain data: it goes into a file, and a worker that
makes the same source anew reads the image from it.
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

from dupr_cli.artifacts.labels import Box
from dupr_cli.datasets.placement import Labels, Size
from dupr_cli.recipe.prepare import SourceSection


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, not read.

    name: its path or address within the source, for people. place: what `read` needs, as JSON has
    it. key: of the sample; by default made of the name. stamp: what tells another version of the
    image or its labels from this one without reading them, see `stamp_of`.
    """

    name: str
    place: Any = None
    split: str = "train"
    key: str = ""
    stamp: str = ""

    @property
    def sample_key(self) -> str:
        return self.key or key_of(self.name)


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
    """A key for a file of that name: no other file has it, and WebDataset takes it as it is."""
    stem = re.sub(r"[^\w-]", "_", PurePosixPath(name).stem, flags=re.ASCII)[:100]
    return f"{stem}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}"


def plain_key(name: str) -> str:
    """A key that is the name itself, where the source guarantees that it is the only one."""
    return name.replace("/", "_").replace(".", "_")


def apart(entries: Iterable[Entry], notes: list[str]) -> Iterator[Entry]:
    """The entries, a key of two splits as another one in the second: what repeats within a split
    is listed twice, but splits may overlap.

    Images that are in two splits are counted in `notes`.
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
        f"{count} images of the split {later} are in {before} too, and stay in both"
        for (before, later), count in again.items()
        if count
    ]


@dataclass(frozen=True)
class RawImage:
    """An image as the source has it.

    boxes: None where the source has no labels; in pixels of the image as it is stored, or, where
    `upright`, as it is seen after its EXIF orientation. unit: boxes are shares of width and height.
    size: (width, height) that the labels were made for, where the source says. left_out, remarks:
    as in `Labels`. label: class of the whole image. source: where the image came from in the first
    place, if not from here. info, extras: see `Sample`.
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

    @classmethod
    def of(cls, data: bytes, labels: Labels | None) -> RawImage:
        """An image with the labels that a reader of `datasets` gives, None where it has none."""
        return cls(data) if labels is None else cls(data, **vars(labels))

    @property
    def labels(self) -> Labels | None:
        if self.boxes is None:
            return None
        return Labels(self.boxes, self.size, self.upright, self.unit, self.left_out, self.remarks)


def labels_not_taken(address: str, found: Sequence[str]) -> str:
    """What is said of files that look like labels where a source takes images alone."""
    return (
        f"{address}: {len(found)} label files were not taken, the first is {found[0]}: this is no "
        f"layout of labels that is known, and its images are taken without. Lay them out as VOC, "
        f"COCO or YOLO, or name theirs with --set source.kind=voc, coco or yolo"
    )


class ImageSource(Protocol):
    """Where images come from. Making one costs nothing: workers make their own.

    A class of another package becomes a source by the entry point group `dupr.sources`.
    """

    # Whether images have boxes: then none may get lost as a duplicate, unless it is asked for.
    labelled: bool
    # Whether reading waits for a server rather than for this machine.
    remote: bool
    # What should be known of the source as a whole, complete when all entries were listed.
    notes: list[str]

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        """address: as given to `dupr prepare`. out: where shards go; not part of the source."""

    def entries(self) -> Iterator[Entry]:
        """All images, in a fixed order, those of one split together or not.

        Raises UsageError when the source is not what it should be.
        """
        ...

    def read(self, entry: Entry) -> RawImage:
        """One image. Raises OSError or DuprError when it or its labels cannot be used."""
        ...


class BuiltIn(ImageSource):
    """A source that can also be recognised from its contents."""

    labelled = False
    remote = False

    def __init__(self, address: str, options: SourceSection, out: Path) -> None:
        self.address, self.options, self.out = address, options, out
        self.notes = []
        self.path = Path(address)

    @classmethod
    def recognises(cls, address: str) -> bool:
        """Whether an address that exists is of this kind."""
        raise NotImplementedError
