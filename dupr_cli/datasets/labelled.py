"""Labelled sets: images with boxes, and masks, from wherever they lie, seen the same way.

Opening a set reads every annotation and image header once, so that what is wrong with the data is
said before any training: missing files, boxes without area, classes. Pixels are decoded later, one
image at a time. Images and boxes are upright (EXIF orientation applied, as `dupr prepare` does),
boxes are pixel edges, 0-based and half-open, inside the image.
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
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from dupr_cli.artifacts.labels import Box, Placement
from dupr_cli.artifacts.results import DatasetIdentity, image_ids_digest
from dupr_cli.datasets.splits import LabelSource, open_source
from dupr_cli.errors import RunError, UsageError
from dupr_cli.metrics.types import Rle, Truth
from dupr_cli.progress import Reporter

_ORIENTATION = 274  # EXIF tag

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
        with _opened(self._source, self._numbers[position]) as (image, _):
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")

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
def _opened(source: LabelSource, number: int) -> Iterator[tuple[Image.Image, int]]:
    """An image whose pixels are not decoded yet, and the size of its file in bytes."""
    try:
        with source.image(number) as file, Image.open(file) as image:
            yield image, file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise RunError(
            f"{source.place(number)}: the image is missing, but the split lists it. Put it there, "
            f"or take it off the list."
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(
            f"{source.place(number)}: the image cannot be decoded ({error}). Replace it, or take "
            f"it out of the set."
        ) from error


def open_labelled(
    address: str, splits: Sequence[str], reporter: Reporter, *, masks: bool = False
) -> LabelledSet:
    """Splits of a labelled set, joined; see label_sources.py for what can be one.

    Boxes are clipped to the image, those left without area are dropped; both are reported.
    masks: keep the objects' outlines, and ask for them.
    Raises UsageError when there is no such set or split, it has no images or no boxes, and
    RunError naming the file when an image or annotation is missing or damaged.
    """
    source = open_source(address, splits)
    annotations, sizes = [], []
    clipped: list[str] = []
    dropped: list[str] = []
    named = " + ".join(splits)
    with reporter.task(f"read {named}", len(source.ids), "images") as task:
        for number, image_id in enumerate(source.ids):
            boxes = source.boxes(number)
            if not all(box.name for box in boxes):
                raise RunError(
                    f"{address}: image {image_id}: an object has no class name; give it one."
                )
            if masks and not all("segmentation" in box.details for box in boxes):
                raise UsageError(
                    f"{address}: image {image_id}: an object has no mask, and the detector of the "
                    f"recipe is trained on masks. Set detector.model to one without."
                )
            with _opened(source, number) as (image, size):
                stored = image.size
                orientation = image.getexif().get(_ORIENTATION, 1)
            annotations.append(
                _annotate(image_id, boxes, stored, orientation, clipped, dropped, masks)
            )
            sizes.append(size)
            task.advance()
    for images, what in (
        (clipped, "reached out of the image and were cut at its edge"),
        (dropped, "had no area inside the image and were dropped"),
    ):
        if images:
            reporter.warning(
                f"{address}, split {named}: {len(images)} boxes {what}; the first is in "
                f"{images[0]}."
            )
    return LabelledSet(
        address, named, tuple(annotations), tuple(sizes), source, tuple(range(len(sizes)))
    )


def _annotate(
    image_id: str,
    boxes: Sequence[Box],
    stored: tuple[int, int],
    orientation: int,
    clipped: list[str],
    dropped: list[str],
    masks: bool,
) -> Annotation:
    """Boxes of the stored image, upright and inside the image.

    clipped, dropped: get the image's id for every box that was changed or left out.
    """
    upright = Placement.upright(orientation, *stored)
    turned = [upright.box(box) for box in boxes]
    corners = np.array([box.corners for box in turned], dtype=np.float64).reshape(-1, 4)
    width, height = stored[::-1] if orientation >= 5 else stored
    inside = corners.clip(0, [width, height, width, height])
    has_area = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    clipped += [image_id] * int(np.count_nonzero((inside != corners).any(axis=1) & has_area))
    dropped += [image_id] * int(np.count_nonzero(~has_area))
    kept = [box for box, keep in zip(turned, has_area, strict=True) if keep]
    sides = (inside[:, 2:] - inside[:, :2])[has_area]
    areas = [box.details.get("area", area) for box, area in zip(kept, sides.prod(1), strict=True)]
    return Annotation(
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
