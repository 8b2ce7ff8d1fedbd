"""The labels of an image in a shard: boxes, and further details from their source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

_FLAGS = ("difficult", "truncated", "crowd")


@dataclass(frozen=True)
class Box:
    """One labelled object. x_min, y_min, x_max, y_max: pixel edges, 0-based, half-open.

    details: further facts from the source, under COCO's names (segmentation, keypoints, area, id,
    ...), in pixels of this image.
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
        """The object in the form that a shard stores."""
        flags = {flag: getattr(self, flag) for flag in _FLAGS}
        return {"class": self.name, "box": list(self.corners), **flags, **self.details}

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Box:
        """Raises KeyError, TypeError or ValueError when `value` is not an object of a shard."""
        x_min, y_min, x_max, y_max = (float(v) for v in cast(Sequence[float], value["box"]))
        flags = {flag: bool(value.get(flag, False)) for flag in _FLAGS}
        details = {k: v for k, v in value.items() if k not in ("class", "box", *_FLAGS)}
        return cls(str(value["class"]), x_min, y_min, x_max, y_max, **flags, details=details)
