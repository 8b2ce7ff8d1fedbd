"""Labels of an image: boxes, what else their source knows about them, and how they move.

An image may be turned upright and made smaller on its way into a shard; its labels go with it. A
`Placement` is that way, for points, boxes, polygons, keypoints and masks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLAGS = ("difficult", "truncated", "crowd")


@dataclass(frozen=True)
class Box:
    """One labelled object. x_min, y_min, x_max, y_max: pixel edges, 0-based, half-open.

    details: what else the source says, under COCO's names (segmentation, keypoints, area, id, ...),
    in the pixels of this image.
    """

    name: str
    x_min: float
    y_min: float
    x_max: float
    y_max: float
    difficult: bool = False
    truncated: bool = False
    crowd: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return (self.x_min, self.y_min, self.x_max, self.y_max)

    def to_json(self) -> dict[str, object]:
        """As a shard holds it."""
        flags = {flag: getattr(self, flag) for flag in _FLAGS}
        return {"class": self.name, "box": list(self.corners), **flags, **self.details}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Box:
        """Raises KeyError, TypeError or ValueError when it is no object of a shard."""
        x_min, y_min, x_max, y_max = (float(v) for v in cast(Sequence[float], value["box"]))
        flags = {flag: bool(value.get(flag, False)) for flag in _FLAGS}
        details = {k: v for k, v in value.items() if k not in ("class", "box", *_FLAGS)}
        return cls(str(value["class"]), x_min, y_min, x_max, y_max, **flags, details=details)


# What each EXIF orientation does to a point (x, y) of an image of w x h, to see it upright.
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
    """How an image of width x height pixels is turned, then scaled to new_width x new_height.

    orientation: EXIF tag 274, 1 to 8.
    """

    orientation: int
    width: int
    height: int
    new_width: int
    new_height: int

    @classmethod
    def upright(cls, orientation: int, width: int, height: int) -> Placement:
        """Turned, and as large as it was."""
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
        """Where a point goes; pixel edges are whole numbers."""
        x, y = _TURNS[self.orientation](x, y, self.width, self.height)
        return x * self.scale[0], y * self.scale[1]

    def box(self, box: Box) -> Box:
        """Where an object goes, with its polygons, keypoints and masks."""
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
        """[x, y, visibility, ...]; COCO's x and y name a pixel, whose centre is 1/2 further on."""
        moved: list[float] = []
        for x, y, visibility in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            if visibility:
                x, y = self.point(x + 0.5, y + 0.5)
                x, y = x - 0.5, y - 0.5
            moved += [x, y, visibility]
        return moved

    def mask(self, rle: Mapping[str, Any]) -> dict[str, object]:
        """A run-length encoded mask, turned, and scaled to the nearest pixel."""
        import numpy as np

        pixels = decode_mask(rle)
        turned = {
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
        return encode_mask(turned[rows][:, columns])


def decode_mask(rle: Mapping[str, Any]) -> NDArray[Any]:
    """Bool (height, width) of a COCO mask, its counts as numbers or in COCO's text form.

    Source: COCO data format, runs of zeros and ones in turn, column by column.
    """
    import numpy as np

    height, width = rle["size"]
    counts = rle["counts"]
    numbers = _numbers(counts) if isinstance(counts, str | bytes) else counts
    values = np.arange(len(numbers)) % 2 == 1
    return np.repeat(values, numbers).reshape(width, height).T


def encode_mask(pixels: NDArray[Any]) -> dict[str, object]:
    """The mask as COCO writes crowds: {"size": [height, width], "counts": [...]}."""
    import numpy as np

    flat = np.concatenate([[False], pixels.T.reshape(-1)])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], starts, [flat.size - 1]]))
    return {"size": list(pixels.shape), "counts": counts.tolist()}


def _numbers(text: str | bytes) -> list[int]:
    """COCO's text form: 5 bits a character, the 6th says that more follow; from the third number
    on, the difference from the number two before."""
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
