"""The probed images: each with a class, with objects, or with neither.

Labelled shards, foreign shards with `.cls`, class folders, plain folders and VOC trees all become
an `ImageSet`. Opening one reads only labels; pixels are decoded later, upright, one image at a
time. If a set has boxes but no classes of whole images, each object is cut out and becomes an
image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.pixel_formats import AnyImage, PixelFormat
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.artifacts.results import DatasetIdentity, image_ids_digest
from dupr_cli.artifacts.shard_files import Sample
from dupr_cli.artifacts.shards import MANIFEST, Manifest, ShardSet, open_shards
from dupr_cli.datasets.labelled import LabelledSet, open_labelled
from dupr_cli.datasets.layout import walk
from dupr_cli.datasets.shards import holds_shards, require_format
from dupr_cli.datasets.text import read_text
from dupr_cli.datasets.voc import find_voc_trees
from dupr_cli.errors import UsageError
from dupr_cli.probe.image_readers import Files, ImageReader, ObjectCrops, Samples, Whole
from dupr_cli.progress import Reporter

LIMIT_TRAIN, LIMIT_TEST = range(2)  # streams of random numbers; the seed's last word separates them


@dataclass(frozen=True)
class ImageSet:
    """Images to probe: all images of a split, or some of them.

    labels: class of each, empty if the set has none. verdicts: for each image and class in it, 1,
    or 0 if all its objects of the class are difficult; empty if the set has no objects. boxed: the
    same images with their boxes, if they have any.
    """

    address: str
    split: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    reader: ImageReader
    numbers: tuple[int, ...]
    verdicts: tuple[Mapping[str, int], ...] = ()
    boxed: LabelledSet | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> list[str]:
        return sorted({*self.labels, *(name for verdict in self.verdicts for name in verdict)})

    @property
    def identity(self) -> DatasetIdentity:
        return DatasetIdentity(
            address=public_address(self.address),
            split=self.split,
            images=len(self),
            objects=sum(len(a.names) for a in self.boxed.annotations) if self.boxed else 0,
            image_ids_sha256=image_ids_digest(self.ids),
        )

    @property
    def digest(self) -> str:
        """sha256 over ids, file sizes, labels and boxes, which determine the figures."""
        digest = hashlib.sha256(self.boxed.digest.encode() if self.boxed else b"")
        for position, image_id in enumerate(self.ids):
            label = self.labels[position] if self.labels else ""
            verdict = sorted(self.verdicts[position].items()) if self.verdicts else ""
            size = self.reader.size(self.numbers[position])
            digest.update(f"{image_id} {size} {label} {verdict}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def image(self, position: int) -> AnyImage:
        """Upright image. Raises RunError naming it if it cannot be decoded."""
        return self.reader.image(self.numbers[position])

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """The images at these positions, in the order given."""
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[i] for i in positions),
            labels=tuple(self.labels[i] for i in positions) if self.labels else (),
            numbers=tuple(self.numbers[i] for i in positions),
            verdicts=tuple(self.verdicts[i] for i in positions) if self.verdicts else (),
            boxed=self.boxed.subset(positions) if self.boxed else None,
        )

    def drawn(self, limit: int | None, seed: int, stream: int) -> ImageSet:
        """The first `limit` images of a seeded shuffle; without a limit, all in order."""
        if limit is None or limit >= len(self):
            return self
        order = np.random.default_rng([seed, stream]).permutation(len(self))
        return self.subset(order[:limit].tolist())


def splits_of(address: str) -> list[str] | None:
    """The split names of a set; None if it has no splits: foreign shards, one tree of folders."""
    path = Path(address)
    trees = find_voc_trees(path)
    if trees:
        return sorted({name for tree in trees for name in tree.splits})
    if (path / MANIFEST).is_file():
        return list(Manifest.read(path).splits)
    if is_remote(address) and not address.endswith(".tar"):
        return []  # opening the set reads its manifest, which names the splits
    if path.is_dir() and not holds_shards(path):
        folders = [folder.name for folder in _folders(path)]
        if "train" in folders and _folders(path / "train"):
            return folders
    return None


def open_classified(
    address: str,
    split: str | None,
    min_object: int,
    reporter: Reporter,
    pixels: PixelFormat | None = None,
) -> ImageSet:
    """Images with a class each: class folders, shards with classes, or the objects of boxes.

    split: None takes all of a set without splits. min_object: pixels along the longer side of the
    smallest object taken; difficult objects are not taken. pixels: of the images, None for RGB.
    Raises UsageError when the set does not exist or has no labels.
    """
    path = Path(address)
    if find_voc_trees(path):
        assert split is not None
        return _objects(open_labelled(address, [split], reporter, pixels=pixels), min_object)
    if _is_shards(address):
        shards = open_shards(address, split)
        first = shards.described(0)
        if _label(first) is None and first.boxes is not None and split is not None:
            return _objects(open_labelled(address, [split], reporter, pixels=pixels), min_object)
        require_format(address, shards.pixels, pixels, reporter)
        return _classified_shards(address, split, shards, pixels)
    if not path.is_dir():
        raise UsageError(f"{address}: this folder or shard does not exist.")
    root = _split_folder(address, split)
    classes = _folders(root)
    paths = [(file, folder.name) for folder in classes for file in _images_under(folder)]
    if not paths:
        raise UsageError(
            f"{root}: no labels were found. Give class folders with images (<class>/<image>), "
            f"labelled shards, or a VOC tree."
        )
    return ImageSet(
        address,
        split or "all",
        tuple(str(file.relative_to(path)) for file, _ in paths),
        tuple(label for _, label in paths),
        Files(tuple(file for file, _ in paths), pixels),
        tuple(range(len(paths))),
    )


def open_pictured(
    address: str, split: str | None, reporter: Reporter, pixels: PixelFormat | None = None
) -> ImageSet:
    """Images with or without labels; VOC trees and labelled shards add their boxes.

    split: None takes the whole set. pixels: of the images, None for RGB. Raises UsageError when it
    has no images.
    """
    path = Path(address)
    if find_voc_trees(path):
        return _labelled(address, split, reporter, pixels)
    if _is_shards(address):
        shards = open_shards(address, split)
        if shards.described(0).boxes is not None and (path / MANIFEST).is_file():
            return _labelled(address, split, reporter, pixels)
        require_format(address, shards.pixels, pixels, reporter)
        ids, samples = tuple(shards.keys()), Samples(shards, pixels)
        return ImageSet(address, split or "all", ids, (), samples, tuple(range(len(ids))))
    if not path.is_dir():
        raise UsageError(f"{address}: this folder or shard does not exist.")
    root = _split_folder(address, split) if split else path
    paths = tuple(_images_under(root))
    if not paths:
        raise UsageError(f"{root}: the folder contains no images.")
    ids = tuple(str(file.relative_to(path)) for file in paths)
    numbers = tuple(range(len(ids)))
    return ImageSet(address, split or "all", ids, (), Files(paths, pixels), numbers)


def _labelled(
    address: str, split: str | None, reporter: Reporter, pixels: PixelFormat | None
) -> ImageSet:
    one = _one_split(address, split)
    return _whole(open_labelled(address, [one], reporter, pixels=pixels))


def open_voc(
    address: str, split: str, reporter: Reporter, pixels: PixelFormat | None = None
) -> ImageSet:
    """Whole images with the classes in them: a VOC tree, or labelled shards of one.

    If ImageSets/Main/<class>_<split>.txt exists, it decides (1, 0 for difficult objects only, -1);
    otherwise the boxes decide, in the same way. Source: VOC development kit, classification task.
    """
    images = open_labelled(address, [split], reporter, pixels=pixels)
    listed = _class_files(address, split, images.classes)
    verdicts = []
    for annotation in images.annotations:
        of_image: dict[str, int] = {}
        for name, difficult in zip(annotation.names, annotation.difficult, strict=True):
            of_image[name] = max(of_image.get(name, 0), int(not difficult))
        for name, lines in listed.items():
            verdict = lines.get(annotation.image_id)
            if verdict == -1:
                of_image.pop(name, None)
            elif verdict is not None:
                of_image[name] = verdict
        verdicts.append(of_image)
    return dataclasses.replace(_whole(images), verdicts=tuple(verdicts))


def _class_files(address: str, split: str, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """By class and image, the value in ImageSets/Main/<class>_<split>.txt: 1, 0 or -1."""
    trees = find_voc_trees(Path(address))
    listed: dict[str, dict[str, int]] = {}
    for tree in trees:
        prefix = f"{tree.root.name}_" if len(trees) > 1 else ""  # as LabelledSet names images
        for name in classes:
            file = tree.root / "ImageSets" / "Main" / f"{name}_{split}.txt"
            if not file.is_file():
                continue
            for number, line in enumerate(read_text(file).splitlines(), 1):
                words = line.split()
                if not words:
                    continue
                if len(words) != 2 or words[1] not in ("1", "0", "-1"):
                    raise UsageError(
                        f"{file}, line {number}: the line is {line.strip()!r}; expected an image "
                        f"id and 1, 0 or -1."
                    )
                listed.setdefault(name, {})[prefix + words[0]] = int(words[1])
    return listed


def divide(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Training and test images: about `fraction` of them for testing, by a hash of their ids.

    An image keeps its side when others are added to the set; objects of one image stay together.
    Raises UsageError when a side is empty.
    """
    held = [_hashed(image_id.partition("#")[0]) < fraction for image_id in images.ids]
    train = images.subset([i for i, out in enumerate(held) if not out])
    test = images.subset([i for i, out in enumerate(held) if out])
    if not len(train) or not len(test):
        raise UsageError(
            f"{images.address}: {len(images)} images do not divide into a test share of "
            f"{fraction} and the rest; change the share. (recipe key: data.test_fraction)"
        )
    share = f"{100 * fraction:g}%"
    return (
        dataclasses.replace(train, split=f"{train.split} without {share}"),
        dataclasses.replace(test, split=f"{share} of {test.split}"),
    )


def open_train_and_test(
    data: str,
    test_data: str | None,
    train_split: str,
    test_split: str,
    fraction: float | None,
    min_object: int,
    reporter: Reporter,
    pixels: PixelFormat | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Training and test images with a class each.

    test_data: another set to test on. fraction: share of the training split (or of a set without
    splits) to hold out for testing, instead of a separate split or set.
    Raises UsageError when no test images are given.
    """

    def opened(address: str, split: str) -> ImageSet:
        has_splits = splits_of(address) is not None
        of_set = split if has_splits else None
        return open_classified(address, of_set, min_object, reporter, pixels)

    if test_data is not None:
        return opened(data, train_split), opened(test_data, test_split)
    if fraction is not None:
        return divide(opened(data, train_split), fraction)
    if not is_remote(data) and not Path(data).exists() and "{" not in data:
        raise UsageError(f"{data}: this folder or shard does not exist.")
    if splits_of(data) is None:
        opened(data, train_split)  # report label errors first
        raise UsageError(
            f"{data}: it has no test split. Give another set with --test-data, or the share of "
            f"images to hold out: --set data.test_fraction=0.2."
        )
    return opened(data, train_split), opened(data, test_split)


def check_classes(train: ImageSet, test: ImageSet, reporter: Reporter) -> list[str]:
    """Names of all classes, sorted; warns about classes that training lacks and shared images.

    Raises UsageError when training has fewer than two classes.
    """
    known = train.classes
    if len(known) < 2:
        found = f"only the class {known[0]!r}" if known else "no class"
        raise UsageError(
            f"{train.address}: the {len(train)} training images have {found}; at least two are "
            f"needed."
        )
    unseen = sorted(set(test.classes) - set(known))
    if unseen:
        reporter.warning(
            f"{test.address}: {', '.join(unseen[:5])}{', ...' * (len(unseen) > 5)}: only test "
            f"images have these classes, so they are never predicted; they count as errors."
        )
    shared = set(train.ids) & set(test.ids)
    if shared and train.address == test.address:
        reporter.warning(
            f"{train.address}: {len(shared)} images, the first is {min(shared)}, are in both "
            f"{train.split} and {test.split}: the result includes images that were trained on."
        )
    return sorted({*known, *test.classes})


def _hashed(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _whole(images: LabelledSet) -> ImageSet:
    numbers = tuple(range(len(images)))
    return ImageSet(
        images.address, images.split, tuple(images.ids), (), Whole(images), numbers, boxed=images
    )


def _objects(images: LabelledSet, min_object: int) -> ImageSet:
    """Every object that is large enough and not difficult, as an image with a class."""
    places, ids, labels = [], [], []
    for position, annotation in enumerate(images.annotations):
        for number, (name, box) in enumerate(zip(annotation.names, annotation.boxes, strict=True)):
            longer = max(box[2] - box[0], box[3] - box[1])
            if not annotation.difficult[number] and longer >= min_object:
                places.append((position, number))
                ids.append(f"{annotation.image_id}#{number}")
                labels.append(name)
    if not places:
        raise UsageError(
            f"{images.address}: the split {images.split!r} has no object of {min_object} pixels "
            f"that is not difficult. (recipe key: data.min_object)"
        )
    return ImageSet(
        images.address,
        images.split,
        tuple(ids),
        tuple(labels),
        ObjectCrops(images, tuple(places)),
        tuple(range(len(places))),
    )


def _label(sample: Sample) -> str | None:
    if sample.label is not None:
        return sample.label
    return sample.extras["cls"].decode().strip() if "cls" in sample.extras else None


def _classified_shards(
    address: str, split: str | None, shards: ShardSet, pixels: PixelFormat | None
) -> ImageSet:
    ids, labels = [], []
    for number in range(len(shards)):
        sample = shards.described(number)
        label = _label(sample)
        if not label:
            raise UsageError(
                f"{shards.name}: sample {sample.key} has no class, neither in its .json nor as "
                f".cls. Make shards of class folders with `dupr prepare`, or give class folders or "
                f"a VOC tree."
            )
        ids.append(sample.key)
        labels.append(label)
    return ImageSet(
        address,
        split or "all",
        tuple(ids),
        tuple(labels),
        Samples(shards, pixels),
        tuple(range(len(ids))),
    )


def _is_shards(address: str) -> bool:
    if is_remote(address) or address.endswith(".tar"):
        return True
    return Path(address).is_dir() and holds_shards(Path(address))


def _one_split(address: str, split: str | None) -> str:
    splits = splits_of(address) or []
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise UsageError(
            f"{address}: choose a split. It has {', '.join(splits)}; give one with --test-split."
        )
    return split


def _split_folder(address: str, split: str | None) -> Path:
    root = Path(address)
    if split is None:
        return root
    if not (root / split).is_dir():
        folders = ", ".join(folder.name for folder in _folders(root)) or "no folders"
        raise UsageError(f"{address}: it has no split {split!r}; it has {folders}.")
    return root / split


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as found:
        names = [e.name for e in found if e.is_dir() and not e.name.startswith(".")]
    return [root / name for name in sorted(names)]


def _images_under(folder: Path) -> Iterator[Path]:
    return (folder / name for name in walk(folder))
