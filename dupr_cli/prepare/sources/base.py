"""What every source is: a listing of images, and how one of them is read.

A source lists its images in an order that depends on nothing but its contents, one `Entry` at a
time, so that a hundred million fit. An entry is plain data: it goes into a file, and a worker that
makes the same source anew reads the image from it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dupr_cli.artifacts.labels import Box
from dupr_cli.recipe.prepare import SourceSection

_KNOWN = """
    .jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm
    .avif .jp2 .tga
"""
IMAGE_SUFFIXES = frozenset(_KNOWN.split())


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


@dataclass(frozen=True)
class RawImage:
    """An image as the source has it.

    boxes: None where the source has no labels; in pixels of the image as it is stored, or, where
    `upright`, as it is seen after its EXIF orientation. unit: boxes are shares of width and height.
    size: (width, height) that the labels were made for, where the source says. label: class of the
    whole image. source: where the image came from in the first place, if not from here. info,
    extras: see `Sample`.
    """

    data: bytes
    boxes: tuple[Box, ...] | None = None
    upright: bool = False
    unit: bool = False
    size: tuple[int, int] | None = None
    label: str | None = None
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)


class ImageSource(Protocol):
    """Where images come from. Making one costs nothing: workers make their own.

    A class of another package becomes a source by the entry point group `dupr.sources`.
    """

    # Whether images have boxes: then none may get lost as a duplicate, unless it is asked for.
    labelled: bool
    # Whether reading waits for a server rather than for this machine.
    remote: bool

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
        self.path = Path(address)

    @classmethod
    def recognises(cls, address: str) -> bool:
        """Whether an address that exists is of this kind."""
        raise NotImplementedError
