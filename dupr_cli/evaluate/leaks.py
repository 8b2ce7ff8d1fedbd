"""Leaks: test images that pre-training has seen, found by their bytes or by their look.

A test image in the pre-training data is not cheating in itself (its labels were not there), but it
must be reported: an AP on seen images is not comparable with others.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.datasets.copies import HashedImages, ImageHashes, hash_image
from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.progress import Reporter
from dupr_cli.runtime.loader import in_batches, load

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
class _HashImage:
    """Reads and hashes an image of the set."""

    images: ShardSet | LabelledSet

    def __call__(self, number: int) -> ImageHashes:
        images = self.images
        return hash_image(
            images[number].image if isinstance(images, ShardSet) else images.read(number),
            images.pixels,
        )


def _hash_images(
    images: ShardSet | LabelledSet, name: str, workers: int, reporter: Reporter
) -> list[ImageHashes]:
    found: list[ImageHashes] = []
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
    seen = HashedImages(_hash_images(shards, "pre-training", workers, reporter))
    tested = _hash_images(test, "test", workers, reporter)
    copies = [(i, copy) for i, known in enumerate(tested) if (copy := seen.find(known))]
    wanted = {copy.number for _, copy in copies}
    names = {i: key for i, key in enumerate(shards.keys()) if i in wanted}
    leaks = [Leak(test.ids[i], names[c.number], c.same_bytes, c.bits) for i, c in copies]
    return Leaks(public_address(address), len(shards), len(leaks), len(test), leaks)
