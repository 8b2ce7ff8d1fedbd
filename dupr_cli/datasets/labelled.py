"""Labelled sets: images with boxes and masks, in one form for all layouts.

Opening a set reads every annotation and image header once, so that faults in the data are reported
before any training: images and labels that cannot be used are left out, named and counted. Pixels
are decoded later, one image at a time. Images and boxes are upright and placed as by `dupr prepare`
(`pixels`, `placement`). Boxes are pixel edges, 0-based and half-open, inside the image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.labels import Box
from dupr_cli.artifacts.pixel_formats import AnyImage, PixelFormat
from dupr_cli.artifacts.results import DatasetIdentity, image_ids_digest
from dupr_cli.datasets.channels import ChannelPicture, open_as
from dupr_cli.datasets.pixels import IMAGE_ERRORS, Picture
from dupr_cli.datasets.placement import Placed, placed, summarise_notes
from dupr_cli.datasets.shards import kept_format, require_format
from dupr_cli.datasets.splits import JoinedSource, LabelSource, open_source
from dupr_cli.errors import RunError, UsageError
from dupr_cli.metrics.types import Rle, Truth
from dupr_cli.progress import Reporter

# COCO's forms of a mask: polygons [x, y, x, y, ...], or run lengths {size, counts}.
Outline = list[list[float]] | dict[str, Any]


@dataclass(frozen=True)
class Annotation:
    """The labels and size of one image, without its pixels.

    width, height: of the upright image, pixels. boxes: (n, 4) float32, x_min, y_min, x_max, y_max.
    names: class of each box. difficult, crowd: (n,) bool. areas: (n,) square pixels, of the
    object's mask if the source gives it, otherwise of the box. outlines: COCO's polygons or run
    lengths of each object, None if masks were not requested. distances: (n, 2) median distance in
    metres, and the share of pixels that have one; None where the source gives none. keypoints:
    (n, K, 3) x, y and COCO's visibility, see `Truth`; None if they were not requested.
    mask_sha256: of the class numbers of all pixels, in sets with semantic masks (semantic.py).
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
    distances: NDArray[np.float64] | None = None
    keypoints: NDArray[np.float64] | None = None
    mask_sha256: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """One split of a labelled set, or some images of it.

    annotations: in the order of the split. sizes: of each image file, bytes. pixels: the format in
    which images are decoded, None for RGB.
    """

    address: str
    split: str
    annotations: tuple[Annotation, ...]
    sizes: tuple[int, ...]
    _source: JoinedSource
    _numbers: tuple[int, ...]
    pixels: PixelFormat | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def ids(self) -> list[str]:
        return [annotation.image_id for annotation in self.annotations]

    @property
    def classes(self) -> list[str]:
        """Names of all objects, sorted."""
        return sorted(self.named)

    @property
    def named(self) -> set[str]:
        """The classes that the annotations name."""
        return {name for annotation in self.annotations for name in annotation.names}

    @property
    def digest(self) -> str:
        """sha256 over image ids, file sizes, boxes, classes and semantic masks, which decide
        training and metrics."""
        digest = hashlib.sha256()
        for annotation, size in zip(self.annotations, self.sizes, strict=True):
            line = f"{annotation.image_id} {size} {annotation.names}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
            digest.update(annotation.boxes.tobytes() + annotation.difficult.tobytes())
            if annotation.keypoints is not None:
                digest.update(annotation.keypoints.tobytes())
            digest.update(annotation.mask_sha256.encode())
        return digest.hexdigest()

    @property
    def identity(self) -> DatasetIdentity:
        return DatasetIdentity(
            address=public_address(self.address),
            split=self.split,
            images=len(self),
            objects=sum(len(annotation.names) for annotation in self.annotations),
            image_ids_sha256=image_ids_digest(self.ids),
        )

    @property
    def keypoint_count(self) -> int:
        """Keypoints of each object; 0 if they were not requested."""
        points = self.annotations[0].keypoints
        return 0 if points is None else points.shape[1]

    @property
    def keypoint_flips(self) -> list[int] | None:
        """The number of each keypoint in a mirrored image, if the set says so."""
        return self._source.keypoint_flips

    def subset(self, positions: Sequence[int]) -> Self:
        """The images at these positions, in the order given."""
        return dataclasses.replace(
            self,
            annotations=tuple(self.annotations[i] for i in positions),
            sizes=tuple(self.sizes[i] for i in positions),
            _numbers=tuple(self._numbers[i] for i in positions),
        )

    def image(self, position: int) -> AnyImage:
        """Upright image. Raises RunError that names it if it cannot be read or decoded."""
        with opened_image(self._source, self._numbers[position], self.pixels) as (picture, _):
            return _decoded(picture, self.pixels)

    def read(self, position: int) -> bytes:
        """The bytes of the image's file."""
        with self._source.image(self._numbers[position]) as file:
            return file.read()

    def truth(self, position: int, classes: Sequence[str]) -> Truth:
        """Objects of an image in the form of the metrics; `classes` numbers the classes."""
        annotation = self.annotations[position]
        labels = np.array([classes.index(name) for name in annotation.names], dtype=np.int64)
        has_masks = annotation.outlines is not None
        return Truth(
            annotation.boxes,
            labels,
            annotation.difficult,
            annotation.crowd,
            annotation.areas,
            self._coded(annotation) if has_masks else None,
            self._source.void(self._numbers[position]) if has_masks else None,
            annotation.distances,
            annotation.keypoints,
        )

    def masks(self, position: int) -> NDArray[np.bool_]:
        """(n, height, width) masks of an image's objects. Raises RunError if one is malformed."""
        annotation = self.annotations[position]
        coded = self._coded(annotation)
        if not coded:
            return np.zeros((0, annotation.height, annotation.width), dtype=np.bool_)
        drawn: NDArray[np.bool_] = coco_mask.decode(list(coded)).astype(np.bool_)
        return drawn.transpose(2, 0, 1)

    def _coded(self, annotation: Annotation) -> tuple[Rle, ...]:
        """Outlines as run lengths over the whole image."""
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
            coco_mask.area(coded)  # fails for malformed run lengths
        except Exception as error:  # pycocotools raises Exception itself
            raise RunError(f"{where}: a mask cannot be drawn ({error}).") from error
        if tuple(coded["size"]) != size:
            raise RunError(
                f"{where}: a mask has {coded['size']} pixels (height x width), but the image has "
                f"{list(size)}."
            )
        counts = coded["counts"]
        return Rle(size=list(size), counts=counts if isinstance(counts, str) else counts.decode())


def _decoded(picture: Picture | ChannelPicture, pixels: PixelFormat | None) -> AnyImage:
    """The image of a picture that was opened in this format."""
    if isinstance(picture, Picture):
        return picture.rgb()
    assert pixels is not None
    return picture.image(pixels)


def require_range(picture: Picture | ChannelPicture, pixels: PixelFormat | None) -> None:
    """Raises one of IMAGE_ERRORS when it is unknown which values of the picture are black and
    white."""
    if isinstance(picture, ChannelPicture) or picture.is_wide:
        _decoded(picture, pixels)  # only decoding shows the range of values


@contextmanager
def opened_image(
    source: LabelSource, number: int, pixels: PixelFormat | None
) -> Iterator[tuple[Picture | ChannelPicture, int]]:
    """Open an image without decoding its pixels; also yields the size of its file in bytes."""
    try:
        with source.image(number) as file:
            picture = open_as(file, pixels)
            size = file.seek(0, io.SEEK_END)
            yield picture, size
    except FileNotFoundError:
        raise RunError(
            f"{source.place(number)}: the image is missing, but the split lists it. Restore it, "
            f"or take it off the list."
        ) from None
    except IMAGE_ERRORS as error:
        raise RunError(
            f"{source.place(number)}: the image cannot be decoded ({error}). Replace it, or take "
            f"it out of the set."
        ) from error


def open_labelled(
    address: str,
    splits: Sequence[str],
    reporter: Reporter,
    *,
    masks: bool = False,
    keypoints: bool = False,
    pixels: PixelFormat | None = None,
) -> LabelledSet:
    """Open splits of a labelled set, joined into one; splits.py lists the layouts.

    Boxes are clipped to the image, and those without area are dropped. Images and labels that
    cannot be used are left out. All of this is reported as warnings.
    masks: keep the objects' outlines; every object must have one. keypoints: keep those of the
    objects, and only objects of classes of which one has keypoints. pixels: the channels and range
    of the images, whatever those of shards were; None for RGB.
    Raises UsageError when the set or split does not exist, or none of its images can be used.
    """
    require_format(address, kept_format(address), pixels, reporter)
    source = open_source(address, splits, keypoints)
    annotations, sizes, numbers = list[Annotation](), list[int](), list[int]()
    points = list[list[list[float] | None]]()
    notes, errors = list[tuple[str, str]](), list[RunError]()
    named = " + ".join(splits)
    with reporter.task(f"read {named}", len(source.ids), "images") as task:
        for number, image_id in enumerate(source.ids):
            try:
                found, upright, size = _read(source, number, pixels)
            except RunError as error:
                errors.append(error)
                continue
            if masks and not all("segmentation" in box.details for box in found.boxes):
                raise UsageError(
                    f"{address}: image {image_id}: an object has no mask, but the detector of the "
                    f"recipe is trained on masks. Set detector.model to one without masks."
                )
            annotation, cut_notes, of_image = _annotate(image_id, found, upright, masks)
            annotations.append(annotation)
            points.append(of_image)
            sizes.append(size)
            numbers.append(number)
            notes += [(image_id, note) for note in (*found.notes, *cut_notes)]
            task.advance()
    where = f"{address}, split {named}"
    if keypoints and annotations:
        annotations = _with_keypoints(where, annotations, points)
    if not annotations:
        raise UsageError(f"{where}: no image can be used; the first of {len(errors)}: {errors[0]}")
    warnings = [*source.notes, *(f"{where}: {text}" for text in summarise_notes(notes))]
    if errors:
        warnings.insert(
            0, f"{where}: {len(errors)} of {len(source.ids)} images were left out; the first: "
            f"{errors[0]}"
        )  # fmt: skip
    for warning in warnings:
        reporter.warning(warning)
    return LabelledSet(
        address, named, tuple(annotations), tuple(sizes), source, tuple(numbers), pixels
    )


def _read(
    source: LabelSource, number: int, pixels: PixelFormat | None
) -> tuple[Placed, tuple[int, int], int]:
    """The objects of an image, its upright size, and its file's size in bytes. Raises RunError."""
    labels = source.labels(number)
    with opened_image(source, number, pixels) as (picture, size):
        require_range(picture, pixels)
        stored, orientation, upright = picture.stored, picture.orientation, picture.upright
    try:
        return placed(labels, stored, orientation), upright, size
    except RunError as error:
        raise RunError(f"{source.place(number)}: {error}.") from error


def _annotate(
    image_id: str, found: Placed, size: tuple[int, int], masks: bool
) -> tuple[Annotation, list[str], list[list[float] | None]]:
    """The objects inside the image, a note for every box that was changed or left out, and the
    keypoints of each object."""
    corners = np.array([box.corners for box in found.boxes], dtype=np.float64).reshape(-1, 4)
    width, height = size
    inside = corners.clip(0, [width, height, width, height])
    has_area = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    cut = int(np.count_nonzero((inside != corners).any(axis=1) & has_area))
    notes = ["box cut: it extended beyond the image and was cut at its edge"] * cut
    notes += ["box dropped: it had no area inside the image"] * int(np.count_nonzero(~has_area))
    usable = [box for box, keep in zip(found.boxes, has_area, strict=True) if keep]
    sides = (inside[:, 2:] - inside[:, :2])[has_area]
    areas = [box.details.get("area", area) for box, area in zip(usable, sides.prod(1), strict=True)]
    annotation = Annotation(
        image_id,
        width,
        height,
        inside[has_area].astype(np.float32),
        tuple(box.name for box in usable),
        np.array([box.difficult for box in usable], dtype=np.bool_),
        np.array([box.crowd for box in usable], dtype=np.bool_),
        np.array(areas, dtype=np.float64),
        tuple(box.details["segmentation"] for box in usable) if masks else None,
        _distances(usable),
    )
    return annotation, notes, [box.details.get("keypoints") for box in usable]


def _with_keypoints(
    where: str, annotations: Sequence[Annotation], points: Sequence[Sequence[list[float] | None]]
) -> list[Annotation]:
    """The objects of the classes that have keypoints. points: of each object of each image."""
    named = [
        (name, flat)
        for annotation, of_image in zip(annotations, points, strict=True)
        for name, flat in zip(annotation.names, of_image, strict=True)
        if flat
    ]
    if not named:
        raise UsageError(
            f"{where}: no object has keypoints, but the detector of the recipe is trained on them. "
            f"Set detector.model to one without keypoints."
        )
    classes, counts = {name for name, _ in named}, {len(flat) // 3 for _, flat in named}
    if len(counts) > 1:
        raise UsageError(
            f"{where}: objects have different numbers of keypoints ({sorted(counts)}); a detector "
            f"predicts the same for all classes. Make a set with one number."
        )
    (count,) = counts
    return [
        _of_classes(annotation, of_image, classes, count)
        for annotation, of_image in zip(annotations, points, strict=True)
    ]


def _of_classes(
    annotation: Annotation, points: Sequence[list[float] | None], classes: set[str], count: int
) -> Annotation:
    kept = [i for i, name in enumerate(annotation.names) if name in classes]
    drawn = np.zeros((len(kept), count, 3))
    for place, i in enumerate(kept):
        if flat := points[i]:
            drawn[place] = np.reshape(flat, (count, 3))
    return dataclasses.replace(
        annotation,
        boxes=annotation.boxes[kept],
        names=tuple(annotation.names[i] for i in kept),
        difficult=annotation.difficult[kept],
        crowd=annotation.crowd[kept],
        areas=annotation.areas[kept],
        outlines=annotation.outlines and tuple(annotation.outlines[i] for i in kept),
        distances=None if annotation.distances is None else annotation.distances[kept],
        keypoints=drawn,
    )


def _distances(boxes: Sequence[Box]) -> NDArray[np.float64] | None:
    if not any("distance" in box.details for box in boxes):
        return None
    return np.array([box.details.get("distance", (-1.0, 0.0)) for box in boxes], dtype=np.float64)
