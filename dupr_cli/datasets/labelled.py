"""Labelled sets: images with boxes, and masks, from wherever they lie, seen the same way.

Opening a set reads every annotation and image header once, so that what is wrong with the data is
said before any training: an image that cannot be used is left out, named and counted, and so is a
label. Pixels are decoded later, one image at a time. Images and boxes are upright and placed as
`dupr prepare` places them (`pixels`, `placement`), boxes are pixel edges, 0-based and half-open,
inside the image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.results import DatasetIdentity, image_ids_digest
from dupr_cli.datasets.pixels import IMAGE_ERRORS, Picture, open_picture
from dupr_cli.datasets.placement import Placed, placed, said
from dupr_cli.datasets.splits import LabelSource, open_source
from dupr_cli.errors import RunError, UsageError
from dupr_cli.metrics.types import Rle, Truth
from dupr_cli.progress import Reporter

# COCO's forms of a mask: polygons [x, y, x, y, ...], or run lengths {size, counts}.
Outline = list[list[float]] | dict[str, Any]


@dataclass(frozen=True)
class Annotation:
    """What is known about one image without its pixels.

    width, height: of the upright image, pixels. boxes: (n, 4) float32, x_min, y_min, x_max, y_max.
    names: class of each box. difficult, crowd: (n,) bool. areas: (n,) of the object, square pixels:
    of its mask where the source says it. outlines: COCO's polygons or run lengths of each object,
    None where masks were not asked for.
    """

    image_id: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    names: tuple[str, ...]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    outlines: tuple[Outline, ...] | None = None


@dataclass(frozen=True)
class LabelledSet:
    """One split of a labelled set, or some images of it.

    annotations: in the order of the split. sizes: of each image file, bytes.
    """

    address: str
    split: str
    annotations: tuple[Annotation, ...]
    sizes: tuple[int, ...]
    _source: LabelSource
    _numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def ids(self) -> list[str]:
        return [annotation.image_id for annotation in self.annotations]

    @property
    def classes(self) -> list[str]:
        """Names of all objects, sorted."""
        return sorted({name for annotation in self.annotations for name in annotation.names})

    @property
    def digest(self) -> str:
        """sha256 over image ids, file sizes, boxes and classes: what training and AP hang on."""
        digest = hashlib.sha256()
        for annotation, size in zip(self.annotations, self.sizes, strict=True):
            digest.update(f"{annotation.image_id} {size} {annotation.names}\n".encode())
            digest.update(annotation.boxes.tobytes() + annotation.difficult.tobytes())
        return digest.hexdigest()

    @property
    def identity(self) -> DatasetIdentity:
        return DatasetIdentity(
            address=self.address,
            split=self.split,
            images=len(self),
            objects=sum(len(annotation.names) for annotation in self.annotations),
            image_ids_sha256=image_ids_digest(self.ids),
        )

    def subset(self, positions: Sequence[int]) -> LabelledSet:
        """The images at these positions, in the order given."""
        return dataclasses.replace(
            self,
            annotations=tuple(self.annotations[i] for i in positions),
            sizes=tuple(self.sizes[i] for i in positions),
            _numbers=tuple(self._numbers[i] for i in positions),
        )

    def image(self, position: int) -> Image.Image:
        """Upright RGB image. Raises RunError naming it when it cannot be read or decoded."""
        with _opened(self._source, self._numbers[position]) as (picture, _):
            return picture.rgb()

    def read(self, position: int) -> bytes:
        """The image's file, as it is."""
        with self._source.image(self._numbers[position]) as file:
            return file.read()

    def truth(self, position: int, classes: Sequence[str]) -> Truth:
        """Objects of an image as the metric wants them; `classes` gives the numbers."""
        annotation = self.annotations[position]
        labels = np.array([classes.index(name) for name in annotation.names], dtype=np.int64)
        return Truth(
            annotation.boxes,
            labels,
            annotation.difficult,
            annotation.crowd,
            annotation.areas,
            None if annotation.outlines is None else self._coded(annotation),
        )

    def masks(self, position: int) -> NDArray[np.bool_]:
        """(n, height, width) of the objects of an image. Raises RunError when one is no mask."""
        annotation = self.annotations[position]
        coded = self._coded(annotation)
        if not coded:
            return np.zeros((0, annotation.height, annotation.width), dtype=np.bool_)
        drawn: NDArray[np.bool_] = coco_mask.decode(list(coded)).astype(np.bool_)
        return drawn.transpose(2, 0, 1)

    def _coded(self, annotation: Annotation) -> tuple[Rle, ...]:
        """Outlines in run lengths of the whole image."""
        assert annotation.outlines is not None
        size = annotation.height, annotation.width
        return tuple(self._run_lengths(o, size, annotation) for o in annotation.outlines)

    def _run_lengths(self, outline: Outline, size: tuple[int, int], annotation: Annotation) -> Rle:
        where = f"{self.address}: image {annotation.image_id}"
        try:
            compressed = isinstance(outline, dict) and isinstance(outline["counts"], str)
            coded = outline if compressed else coco_mask.frPyObjects(outline, *size)
            if isinstance(coded, list):
                coded = coco_mask.merge(coded)
            coco_mask.area(coded)  # fails for run lengths that are none
        except Exception as error:  # pycocotools raises Exception itself
            raise RunError(f"{where}: a mask cannot be drawn ({error}).") from error
        if tuple(coded["size"]) != size:
            raise RunError(
                f"{where}: a mask is of {coded['size']}, height x width, but the image is of "
                f"{list(size)}."
            )
        counts = coded["counts"]
        return Rle(size=list(size), counts=counts if isinstance(counts, str) else counts.decode())


@contextmanager
def _opened(source: LabelSource, number: int) -> Iterator[tuple[Picture, int]]:
    """An image whose pixels are not decoded yet, and the size of its file in bytes."""
    try:
        with source.image(number) as file:
            picture = open_picture(file)
            size = file.seek(0, io.SEEK_END)
            yield picture, size
    except FileNotFoundError:
        raise RunError(
            f"{source.place(number)}: the image is missing, but the split lists it. Put it there, "
            f"or take it off the list."
        ) from None
    except IMAGE_ERRORS as error:
        raise RunError(
            f"{source.place(number)}: the image cannot be decoded ({error}). Replace it, or take "
            f"it out of the set."
        ) from error


def open_labelled(
    address: str, splits: Sequence[str], reporter: Reporter, *, masks: bool = False
) -> LabelledSet:
    """Splits of a labelled set, joined; see splits.py for what can be one.

    Boxes are clipped to the image, those left without area are dropped; images and labels that
    cannot be used are left out: all of it is reported as warnings.
    masks: keep the objects' outlines, and ask for them.
    Raises UsageError when there is no such set or split, it has no images, or none of them can be
    used.
    """
    source = open_source(address, splits)
    annotations, sizes, numbers = list[Annotation](), list[int](), list[int]()
    notes, errors = list[tuple[str, str]](), list[RunError]()
    named = " + ".join(splits)
    with reporter.task(f"read {named}", len(source.ids), "images") as task:
        for number, image_id in enumerate(source.ids):
            try:
                found, upright, size = _read(source, number)
            except RunError as error:
                errors.append(error)
                continue
            if masks and not all("segmentation" in box.details for box in found.boxes):
                raise UsageError(
                    f"{address}: image {image_id}: an object has no mask, and the detector of the "
                    f"recipe is trained on masks. Set detector.model to one without."
                )
            annotation, further = _annotate(image_id, found, upright, masks)
            annotations.append(annotation)
            sizes.append(size)
            numbers.append(number)
            notes += [(image_id, note) for note in (*found.notes, *further)]
            task.advance()
    where = f"{address}, split {named}"
    if not annotations:
        raise UsageError(f"{where}: no image can be used; the first of {len(errors)}: {errors[0]}")
    warnings = [*source.notes, *(f"{where}: {text}" for text in said(notes))]
    if errors:
        warnings.insert(
            0, f"{where}: {len(errors)} of {len(source.ids)} images were left out; the first: "
            f"{errors[0]}"
        )  # fmt: skip
    for warning in warnings:
        reporter.warning(warning)
    return LabelledSet(address, named, tuple(annotations), tuple(sizes), source, tuple(numbers))


def _read(source: LabelSource, number: int) -> tuple[Placed, tuple[int, int], int]:
    """The objects of an image, its upright size, and the bytes of its file. Raises RunError."""
    labels = source.labels(number)
    with _opened(source, number) as (picture, size):
        if picture.is_wide:
            picture.rgb()  # only its pixels tell whether they can be used
        stored, orientation, upright = picture.stored, picture.orientation, picture.upright
    try:
        return placed(labels, stored, orientation), upright, size
    except RunError as error:
        raise RunError(f"{source.place(number)}: {error}.") from error


def _annotate(
    image_id: str, found: Placed, size: tuple[int, int], masks: bool
) -> tuple[Annotation, list[str]]:
    """Objects inside the image, and a note for every box that was changed or left out."""
    corners = np.array([box.corners for box in found.boxes], dtype=np.float64).reshape(-1, 4)
    width, height = size
    inside = corners.clip(0, [width, height, width, height])
    has_area = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    cut = int(np.count_nonzero((inside != corners).any(axis=1) & has_area))
    notes = ["box cut: it reached out of the image and was cut at its edge"] * cut
    notes += ["box dropped: it had no area inside the image"] * int(np.count_nonzero(~has_area))
    kept = [box for box, keep in zip(found.boxes, has_area, strict=True) if keep]
    sides = (inside[:, 2:] - inside[:, :2])[has_area]
    areas = [box.details.get("area", area) for box, area in zip(kept, sides.prod(1), strict=True)]
    annotation = Annotation(
        image_id,
        width,
        height,
        inside[has_area].astype(np.float32),
        tuple(box.name for box in kept),
        np.array([box.difficult for box in kept], dtype=np.bool_),
        np.array([box.crowd for box in kept], dtype=np.bool_),
        np.array(areas, dtype=np.float64),
        tuple(box.details["segmentation"] for box in kept) if masks else None,
    )
    return annotation, notes
