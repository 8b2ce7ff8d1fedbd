"""A canvas for painting a thing in its own coordinates, with pose, relief and light.

A pose maps the thing's local frame (x to the right, y down, the thing within about 1 of the origin)
to pixels; parts are given by signed distances in that frame, negative inside, and painted over each
other. Each part raises the relief, whose slopes the light then shades. The canvas has twice the
resolution of the scene; the finished sprite averages 2 x 2 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dupr_cli.demo.textures import Colour, Plane, Rng, length

SUPERSAMPLING = 2
# Margin around the thing's ellipse for parts that stick out.
_MARGIN = 1.4


@dataclass(frozen=True)
class Light:
    """direction: (x, y, z) unit vector towards the light, image x and y, z towards the camera."""

    direction: tuple[float, float, float]
    ambient: float

    @classmethod
    def draw(cls, rng: Rng) -> Light:
        turn, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.85)
        flat = float(np.sqrt(1 - height**2))
        # The light comes mostly from above: the upper half of the image plane.
        x, y = flat * float(np.cos(turn)), flat * -abs(float(np.sin(turn)))
        return cls((x, y, height), rng.uniform(0.3, 0.6))


@dataclass(frozen=True)
class Pose:
    """side: longest side of the thing's box, scene pixels. angle: radians. squeeze: width over
    height, relative to the upright thing. shear and tilt (perspective): 0 for none."""

    side: float
    angle: float
    squeeze: float = 1.0
    shear: float = 0.0
    tilt: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False

    def matrix(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """(2, 2) matrix from local coordinates to the image plane, without scale."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        sideways = -self.squeeze if self.mirrored else self.squeeze
        turned = np.array([[c, -s], [s, c]])
        return np.asarray(turned @ np.array([[1, self.shear], [0, 1]]) @ np.diag([sideways, 1.0]))


@dataclass(frozen=True)
class Sprite:
    """A painted thing. colour: (3, H, W) linear light, multiplied by coverage. coverage: (H, W)."""

    colour: Colour
    coverage: Plane


class Canvas:
    """u, v: (H, W) local coordinates of the pixels. pixel: a pixel's size in them."""

    def __init__(self, pose: Pose, extent: tuple[float, float], rng: Rng):
        """extent: half axes, in local units, of the ellipse that the thing roughly fills."""
        matrix = pose.matrix()
        reach = np.hypot(matrix[:, 0] * extent[0], matrix[:, 1] * extent[1])
        half_side = SUPERSAMPLING * pose.side / 2
        scale = half_side / reach.max()
        margin = _MARGIN / (1 - np.hypot(*pose.tilt))  # perspective enlarges the near side
        halves = np.ceil(reach * scale * margin / SUPERSAMPLING).astype(int) * SUPERSAMPLING
        x = np.arange(-halves[0] + 0.5, halves[0], dtype=np.float32)[None, :]
        y = np.arange(-halves[1] + 0.5, halves[1], dtype=np.float32)[:, None]
        depth = 1 + (np.float32(pose.tilt[0]) * x + np.float32(pose.tilt[1]) * y) / half_side
        back = (np.linalg.inv(matrix) / scale).astype(np.float32)
        self.u: Plane = (back[0, 0] * x + back[0, 1] * y) / depth
        self.v: Plane = (back[1, 0] * x + back[1, 1] * y) / depth
        self.pixel = float(np.sqrt(abs(np.linalg.det(back))))
        self.shape = self.u.shape
        self._colour: Colour = np.zeros((3, *self.shape), np.float32)
        self._coverage: Plane = np.zeros(self.shape, np.float32)
        self._relief: Plane = np.zeros(self.shape, np.float32)
        self._rim = rng.uniform(0.1, 0.5)

    def paint(
        self, distance: Plane, colour: Colour, *, height: float | Plane = 0.0, bevel: float = 0.1
    ) -> None:
        """Paint a part over the earlier parts.

        distance: signed, local units, negative inside. colour: (3, 1, 1) or (3, H, W).
        height: of the part's surface above the ground, local units. bevel: width of its round edge.
        """
        alpha = np.clip(0.5 - distance / self.pixel, 0, 1)
        # The profile is 0 at the edge, 1 on the flat surface, and a quarter of a circle in between.
        inner = np.clip(1 + distance / bevel, 0, 1)
        surface = height + np.float32(bevel) * np.sqrt(1 - inner * inner)
        shade = np.float32(1) - np.float32(self._rim) * inner**3
        self._colour += alpha * (colour * shade - self._colour)
        self._coverage += alpha * (1 - self._coverage)
        self._relief += alpha * (surface - self._relief)

    def sprite(self, light: Light, gloss: float = 0.0) -> Sprite:
        """The thing in the light, at the scene's resolution. gloss: strength of highlights."""
        down, right = np.gradient(self._relief / np.float32(self.pixel))
        # Limiting the slopes keeps steps between parts from becoming black and white lines.
        down, right = np.clip(down, -2, 2), np.clip(right, -2, 2)
        x, y, z = (np.float32(part) for part in light.direction)
        facing = (z - x * right - y * down) / np.sqrt(1 + right * right + down * down)
        np.clip(facing, 0, 1, out=facing)
        brightness = np.float32(light.ambient) + np.float32((1 - light.ambient) / z) * facing
        colour = self._colour * np.minimum(brightness, 1.6)
        if gloss > 0:
            colour += np.float32(gloss) * self._coverage * facing**24
        return Sprite(_halve(colour), _halve(self._coverage))


def _halve(planes: Plane) -> Plane:
    """(..., H, W) to (..., H/2, W/2), means of 2 x 2 pixels."""
    rows = planes[..., 0::2, :] + planes[..., 1::2, :]
    mean: Plane = (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)
    return mean


# Signed distances, local units, negative inside. They are exact if that is cheap, else accurate
# near the edge, where they are used.


def ellipse(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    radius = length(u / half_width, v / half_height)
    distance: Plane = (radius - 1) * np.float32(min(half_width, half_height))
    return distance


def box(u: Plane, v: Plane, x_min: float, y_min: float, x_max: float, y_max: float) -> Plane:
    across, down = np.maximum(x_min - u, u - x_max), np.maximum(y_min - v, v - y_max)
    distance: Plane = np.maximum(across, down)
    return distance


def line(
    u: Plane, v: Plane, *points: tuple[float, float], width: float, taper: float = 0.0
) -> Plane:
    """A bent line with round ends. width: half its width, which shrinks by `taper` per segment."""
    best: Plane | None = None
    for number, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((u - x0) * dx + (v - y0) * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
        away = length(u - x0 - along * dx, v - y0 - along * dy) - (width - number * taper)
        best = away if best is None else np.minimum(best, away)
    if best is None:
        raise ValueError("a line needs at least two points")
    return best


def convex(u: Plane, v: Plane, *corners: tuple[float, float]) -> Plane:
    """A convex polygon, its corners clockwise as seen on the screen."""
    best: Plane | None = None
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        # With y down, a clockwise edge has the outside on its left.
        away = (u - x0) * ((y1 - y0) / length) - (v - y0) * ((x1 - x0) / length)
        best = away if best is None else np.maximum(best, away)
    if best is None:
        raise ValueError("a polygon needs corners")
    return best
