"""Places labels on the pixels of an upright image; every reader uses this module.

A reader returns `Labels` as their file has them. `placed` turns and scales them, with their
polygons, keypoints and masks, to the upright image. The size that their file states decides whether
they were drawn on the stored or on the upright pixels. If the size cannot decide (180 degrees,
mirrored, square, no size), they count as drawn on the stored pixels, and a note says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dupr_cli.artifacts.labels import Box
from dupr_cli.errors import RunError

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Labels:
    """Objects of one image in the coordinates of their source.

    size: of the image that they were drawn on, None if the source does not give it. upright: they
    were drawn on the upright image. unit: coordinates are fractions of its sides. left_out: reasons
    for each label that could not be used. remarks: notes on labels that were used.
    """

    boxes: tuple[Box, ...] = ()
    size: Size | None = None
    upright: bool = False
    unit: bool = False
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placed:
    """Objects in pixels of the upright image.

    notes: one line for each label left out and each remark; a line begins with its kind and a
    colon.
    """

    boxes: tuple[Box, ...]
    notes: tuple[str, ...]


def placed(labels: Labels, stored: Size, orientation: int, new: Size | None = None) -> Placed:
    """Place labels on an image of `stored` pixels with this orientation, scaled to `new` pixels.

    Raises RunError if the labels belong to an image of another shape.
    """
    upright = stored[::-1] if orientation >= 5 else stored
    named = [box for box in labels.boxes if box.name]
    left_out = [
        *labels.left_out,
        *["an object has no class name"] * (len(labels.boxes) - len(named)),
    ]
    notes = [*(f"label left out: {reason}" for reason in left_out), *labels.remarks]
    frame, turned = _frame(labels, stored, upright, orientation)
    new = new or upright
    boxes = [_in_pixels(box, frame) for box in named] if labels.unit else named
    placement = Placement(1 if turned else orientation, *frame, *new)
    if boxes and frame not in (stored, upright):
        notes.append(
            f"labels scaled: they are for {_text(frame)} pixels, but the image has "
            f"{_text(upright if turned else stored)}"
        )
    known = labels.upright or labels.unit or orientation == 1
    if boxes and not known and _in_doubt(labels.size, frame, orientation):
        notes.append(
            f"orientation in doubt: EXIF orientation {orientation}, and the labels' size does not "
            f"show whether they were drawn on the upright image; they are taken as drawn on the "
            f"stored one"
        )
    moved = []
    for box in boxes:
        try:
            moved.append(placement.box(box))
        except (ValueError, IndexError) as error:
            rest = {k: v for k, v in box.details.items() if k != "segmentation"}
            moved.append(placement.box(replace(box, details=rest)))
            notes.append(f"mask left out: of {box.name}: {error}")
    return Placed(tuple(moved), tuple(notes))


def placed_mask(
    mask: NDArray[np.uint8], stored: Size, orientation: int, new: Size | None = None
) -> NDArray[np.uint8]:
    """Place the class numbers of all pixels on an image like `placed`; (height, width).

    Raises RunError unless the mask has the size of the image, as stored or upright.
    """
    upright = stored[::-1] if orientation >= 5 else stored
    size = mask.shape[1], mask.shape[0]
    if size not in (stored, upright):
        raise RunError(
            f"its mask has {_text(size)} pixels, but the image has {_text(upright)}; give the mask "
            f"that was drawn on this image"
        )
    turned = size == stored
    placement = Placement(orientation if turned else 1, *size, *(new or upright))
    return np.ascontiguousarray(placement.values(mask))


def summarise_notes(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Summarise (image, note) pairs: one line per kind, with the number of notes and the first."""
    first: dict[str, str] = {}
    counts = Counter(note.partition(":")[0] for _, note in notes)
    for image, note in notes:
        kind, _, detail = note.partition(": ")
        first.setdefault(kind, f"{image}: {detail}")
    return [f"{kind}: {counts[kind]} in all; the first: {first[kind]}" for kind in counts]


def _frame(labels: Labels, stored: Size, upright: Size, orientation: int) -> tuple[Size, bool]:
    """Size of the image that the labels were drawn on, and whether that image was upright."""
    if labels.upright or labels.unit:
        return upright, True
    size = labels.size
    if size is None or size == stored or (orientation == 1 and _same_shape(size, stored)):
        return size or stored, False
    if orientation >= 5 and size == upright:
        return size, True
    if _same_shape(size, stored):
        return size, False
    if orientation >= 5 and _same_shape(size, upright):
        return size, True
    raise RunError(
        f"its labels are for an image of {_text(size)} pixels, but the image has {_text(stored)}; "
        f"correct the size, or give the image that was labelled"
    )


def _in_doubt(size: Size | None, frame: Size, orientation: int) -> bool:
    return size is None or orientation < 5 or _same_shape(frame, frame[::-1])


def _same_shape(first: Size, second: Size) -> bool:
    """Whether one size is the other one resized, to within a pixel."""
    return abs(first[0] * second[1] - first[1] * second[0]) <= max(*first, *second)


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _in_pixels(box: Box, size: Size) -> Box:
    """Convert a box with its polygons and keypoints from fractions of the sides to pixels."""
    width, height = size
    details = dict(box.details)
    if "segmentation" in details:
        details["segmentation"] = [
            [value * size[place % 2] for place, value in enumerate(polygon)]
            for polygon in details["segmentation"]
        ]
    if "keypoints" in details:
        sides = (width, height, 1)
        details["keypoints"] = [v * sides[i % 3] for i, v in enumerate(details["keypoints"])]
    return replace(
        box, x_min=box.x_min * width, y_min=box.y_min * height, x_max=box.x_max * width,
        y_max=box.y_max * height, details=details,
    )  # fmt: skip


# The map of each EXIF orientation from a point (x, y) of an image of w x h to the upright image.
# Source: EXIF 2.3, tag Orientation.
_TURNS: dict[int, Callable[[float, float, int, int], tuple[float, float]]] = {
    1: lambda x, y, _w, _h: (x, y),
    2: lambda x, y, w, _h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, _w, h: (x, h - y),
    5: lambda x, y, _w, _h: (y, x),
    6: lambda x, y, _w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, _h: (y, w - x),
}


@dataclass(frozen=True)
class Placement:
    """Turns an image of width x height pixels, then scales it to new_width x new_height.

    orientation: EXIF tag 274, 1 to 8.
    """

    orientation: int
    width: int
    height: int
    new_width: int
    new_height: int

    @classmethod
    def upright(cls, orientation: int, width: int, height: int) -> Placement:
        """A placement that only turns the image upright, without scaling."""
        sides = (height, width) if orientation >= 5 else (width, height)
        return cls(orientation, width, height, *sides)

    @property
    def upright_size(self) -> tuple[int, int]:
        sideways = self.orientation >= 5
        return (self.height, self.width) if sideways else (self.width, self.height)

    @property
    def moves(self) -> bool:
        return self.orientation != 1 or (self.new_width, self.new_height) != self.upright_size

    @property
    def scale(self) -> tuple[float, float]:
        """New pixels per old pixel of the upright image, along x and y."""
        width, height = self.upright_size
        return self.new_width / width, self.new_height / height

    def point(self, x: float, y: float) -> tuple[float, float]:
        """The new position of a point; pixel edges are whole numbers."""
        x, y = _TURNS[self.orientation](x, y, self.width, self.height)
        return x * self.scale[0], y * self.scale[1]

    def box(self, box: Box) -> Box:
        """An object in its new position, with its polygons, keypoints and masks."""
        if not self.moves:
            return box
        (xs, ys) = zip(
            self.point(box.x_min, box.y_min), self.point(box.x_max, box.y_max), strict=True
        )
        return replace(
            box, x_min=min(xs), y_min=min(ys), x_max=max(xs), y_max=max(ys),
            details={name: self._detail(name, value) for name, value in box.details.items()},
        )  # fmt: skip

    def _detail(self, name: str, value: Any) -> Any:
        if name == "segmentation" and isinstance(value, Mapping):
            return self.mask(value)
        if name == "segmentation" and isinstance(value, list):
            return [self._polygon(polygon) for polygon in value]
        if name == "keypoints" and isinstance(value, list):
            return self._keypoints(value)
        if name == "area" and isinstance(value, int | float):
            return value * self.scale[0] * self.scale[1]
        return value

    def _polygon(self, flat: Sequence[float]) -> list[float]:
        points = (self.point(x, y) for x, y in zip(flat[::2], flat[1::2], strict=True))
        return [value for point in points for value in point]

    def _keypoints(self, flat: Sequence[float]) -> list[float]:
        """[x, y, visibility, ...]; COCO's x and y index a pixel, whose centre is at + 1/2."""
        moved: list[float] = []
        for x, y, visibility in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            if visibility:
                x, y = self.point(x + 0.5, y + 0.5)
                x, y = x - 0.5, y - 0.5
            moved += [x, y, visibility]
        return moved

    def mask(self, rle: Mapping[str, Any]) -> dict[str, object]:
        """Turn a run-length encoded mask, and scale it by nearest neighbour."""
        pixels = decode_mask(rle)
        if pixels.shape != (self.height, self.width):
            raise ValueError(
                f"a mask has {list(pixels.shape)} pixels (height x width), but the image has "
                f"{[self.height, self.width]}"
            )
        return encode_mask(self.values(pixels))

    def values(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn an array (height, width), and scale it by nearest neighbour: no value is mixed."""
        turned: NDArray[Any] = {
            1: lambda m: m,
            2: lambda m: m[:, ::-1],
            3: lambda m: m[::-1, ::-1],
            4: lambda m: m[::-1],
            5: lambda m: m.T,
            6: lambda m: m[::-1].T,
            7: lambda m: m[::-1, ::-1].T,
            8: lambda m: m[:, ::-1].T,
        }[self.orientation](pixels)
        rows = ((np.arange(self.new_height) + 0.5) / self.scale[1]).astype(int)
        columns = ((np.arange(self.new_width) + 0.5) / self.scale[0]).astype(int)
        scaled: NDArray[Any] = turned[rows][:, columns]
        return scaled


def decode_mask(rle: Mapping[str, Any]) -> NDArray[Any]:
    """Bool (height, width) of a COCO mask whose counts are numbers or COCO's text form.

    Source: COCO data format, alternating runs of zeros and ones, column by column.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    numbers = _numbers(counts) if isinstance(counts, str | bytes) else counts
    values = np.arange(len(numbers)) % 2 == 1
    return np.repeat(values, numbers).reshape(width, height).T


def encode_mask(pixels: NDArray[Any]) -> dict[str, object]:
    """The mask as COCO writes crowds: {"size": [height, width], "counts": [...]}."""
    flat = np.concatenate([[False], pixels.T.reshape(-1)])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], starts, [flat.size - 1]]))
    return {"size": list(pixels.shape), "counts": counts.tolist()}


def _numbers(text: str | bytes) -> list[int]:
    """Decode COCO's text form: each character has 5 bits of a number and a 6th bit that says
    whether more follow; from the third number on, the difference to the number two before."""
    codes = text.encode() if isinstance(text, str) else text
    numbers: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = shift = 0
    return numbers
