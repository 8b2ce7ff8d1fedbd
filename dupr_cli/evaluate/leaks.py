"""Leaks: test images that pre-training has seen, found by their bytes or by their look.

A test image in the pre-training data is not cheating in itself (its labels were not there), but it
must be reported: an AP on seen images is not comparable with others.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dupr_cli.artifacts.hashes import count_bits, perceptual_hash
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.datasets.pixels import IMAGE_ERRORS, open_picture
from dupr_cli.progress import Reporter
from dupr_cli.runtime.loader import in_batches, load

# Of 64 bits, this many may differ: copies of a photograph in other sizes and qualities stay within.
DISTANCE = 6
_AT_A_TIME = 16  # images that a worker hashes for one message to the main process


@dataclass(frozen=True)
class Leak:
    """A test image and its place in the pre-training data. bits: hash bits that differ."""

    test_image: str
    pretraining_image: str
    same_bytes: bool
    bits: int


@dataclass(frozen=True)
class Leaks:
    """The leaks found in one pre-training set. test_images: how many of them are in it."""

    address: str
    pretraining_images: int
    test_images: int
    tested: int
    found: list[Leak]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        same = sum(leak.same_bytes for leak in self.found)
        return (
            f"{self.test_images} of {self.tested} test images are among the "
            f"{self.pretraining_images} of {self.address} ({same} byte for byte, the others look "
            f"the same)"
        )


@dataclass(frozen=True)
class _ImageHashes:
    """The hashes of one image. sha256: of its bytes. perceptual: None if it does not decode."""

    sha256: bytes
    perceptual: int | None


@dataclass(frozen=True)
class _HashImage:
    """Reads and hashes an image of the set."""

    images: ShardSet | LabelledSet

    def __call__(self, number: int) -> _ImageHashes:
        images = self.images
        data = images[number].image if isinstance(images, ShardSet) else images.read(number)
        digest = hashlib.sha256(data).digest()
        try:
            picture = open_picture(io.BytesIO(data))
            scale = max(1.0, min(picture.upright) / 128)  # lets a JPEG decode at an eighth
            small = (round(picture.upright[0] / scale), round(picture.upright[1] / scale))
            return _ImageHashes(digest, perceptual_hash(picture.rgb(small, Image.Resampling.BOX)))
        except IMAGE_ERRORS:
            return _ImageHashes(digest, None)


def _hash_images(
    images: ShardSet | LabelledSet, name: str, workers: int, reporter: Reporter
) -> list[_ImageHashes]:
    found: list[_ImageHashes] = []
    requests = in_batches(len(images), _AT_A_TIME)
    with (
        reporter.task(f"hash {name}", len(images), "images") as task,
        closing(load(_HashImage(images), list, requests, workers)) as batches,
    ):
        for prints in batches:
            found += prints
            task.advance(len(prints))
    return found


def find_leaks(test: LabelledSet, address: str, workers: int, reporter: Reporter) -> Leaks:
    """Test images among those of shards. Raises UsageError if the address holds none."""
    shards = open_shards(address)
    seen = _hash_images(shards, "pre-training", workers, reporter)
    tested = _hash_images(test, "test", workers, reporter)
    by_bytes = {known.sha256: number for number, known in enumerate(seen)}
    looks = np.array([known.perceptual or 0 for known in seen], dtype=np.uint64)
    usable = np.array([known.perceptual is not None for known in seen])
    pairs = _nearest(tested, looks, usable)
    rows = []
    for number, known in enumerate(tested):
        if known.sha256 in by_bytes:
            rows.append((number, by_bytes[known.sha256], True, 0))
        elif number in pairs:
            rows.append((number, pairs[number][0], False, pairs[number][1]))
    wanted = {row[1] for row in rows}
    names = {i: key for i, key in enumerate(shards.keys()) if i in wanted}
    leaks = [Leak(test.ids[i], names[j], same, bits) for i, j, same, bits in rows]
    return Leaks(address, len(shards), len(leaks), len(test), leaks)


def _nearest(
    tested: Sequence[_ImageHashes], looks: NDArray[np.uint64], usable: NDArray[np.bool_]
) -> dict[int, tuple[int, int]]:
    """Test image to the pre-training image that looks most like it, and the bits that differ."""
    found = {}
    for number, known in enumerate(tested):
        if known.perceptual is None or not usable.any():
            continue
        bits = np.where(usable, count_bits(looks ^ np.uint64(known.perceptual)), 64)
        nearest = int(bits.argmin())
        if bits[nearest] <= DISTANCE:
            found[number] = (nearest, int(bits[nearest]))
    return found
