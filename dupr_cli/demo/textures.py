"""Colours, noise and patterns of the generated scenes, and the backgrounds made from them.

Objects, distractors and backgrounds share these surfaces, so that neither a colour nor a pattern
alone reveals an object. Planes are (H, W) float32; colours are (3, H, W) or (3, 1, 1), as linear
light in [0, 1]. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]
Colour = NDArray[np.floating]
Rng = np.random.Generator

_TILE = 512
_WAVELENGTHS = (4, 8, 16, 32, 64, 128)
GAMMA = 2.2
TURN = 2 * np.pi


@lru_cache(maxsize=1)
def _noise_bands() -> Plane:
    """(octaves, 512, 512) tileable noise, one band of wavelengths each, mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    across = np.fft.fftfreq(_TILE)
    frequency = np.hypot(across[:, None], across[None, : _TILE // 2 + 1])
    frequency[0, 0] = 1e-9
    bands = []
    for wavelength in _WAVELENGTHS:
        spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE)))
        spectrum *= np.exp(-2 * np.log2(frequency * wavelength) ** 2)
        band = np.fft.irfft2(spectrum, (_TILE, _TILE))
        bands.append(band / band.std())
    return np.stack(bands).astype(np.float32)


@cache
def _fractal(longest: int, roughness_tenths: int) -> Plane:
    """(512, 512) tileable sum of octaves, mean 0 and variance 1; `noise` cuts pieces from it."""
    octaves = [band for band, w in zip(_noise_bands(), _WAVELENGTHS, strict=True) if w <= longest]
    total: Plane = np.zeros((_TILE, _TILE), np.float32)
    for step_down, band in enumerate(reversed(octaves)):
        total += np.float32((roughness_tenths / 10) ** step_down) * band
    total /= total.std()
    return total


def noise(
    shape: tuple[int, int],
    rng: Rng,
    *,
    longest: int = 64,
    roughness: float = 0.6,
    stretch: int = 1,
) -> Plane:
    """Multi-octave noise with approximate mean 0 and variance 1.

    longest: wavelength of the first octave, a power of two from 4 to 128 pixels. roughness:
    amplitude of each octave relative to the one above it, to one decimal. stretch: factor by which
    the grain is longer along one of the two axes.
    """
    tile = _fractal(longest, round(10 * roughness))
    upright = stretch > 1 and rng.random() < 0.5
    down, along = (1, stretch) if upright else (stretch, 1)
    # Stepping faster across the grain stretches it without making it blocky.
    rows = np.arange(shape[0]) * down + rng.integers(_TILE)
    columns = np.arange(shape[1]) * along + rng.integers(_TILE)
    return tile.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap")


def step(value: Plane, softness: float) -> Plane:
    """0 below zero and 1 above, with a ramp `softness` wide: an antialiased threshold."""
    ramp: Plane = np.clip(value * (1 / max(softness, 1e-3)) + 0.5, 0, 1)
    return ramp


def length(x: Plane, y: Plane) -> Plane:
    """Length of vectors. np.hypot also guards against overflow, but takes ten times as long."""
    return np.sqrt(x * x + y * y)


def mix(first: Colour, second: Colour, share: Plane) -> Colour:
    """Blend to (3, H, W): `first` at share 0, `second` at share 1."""
    blended: Colour = first + share * (second - first)
    return blended


def _off_centre(value: Plane) -> Plane:
    """Distance to the nearest whole number, 0 to 0.5."""
    return np.abs(value - np.rint(value))


# Patterns take coordinates in cells, and `soft`, the size of a pixel in cells; they return (H, W)
# in [0, 1]. Each pattern marks one class, and also occurs in backgrounds and distractors.


def stripes(u: Plane, v: Plane, soft: float, duty: float = 0.5) -> Plane:
    return step(duty / 2 - _off_centre(u), soft)


def checker(u: Plane, v: Plane, soft: float) -> Plane:
    return step(32 * (_off_centre(u / 2) - 0.25) * (_off_centre(v / 2) - 0.25), 4 * soft)


def dots(u: Plane, v: Plane, soft: float) -> Plane:
    row = np.rint(v * 1.15)
    return step(0.31 - length(_off_centre(u + row * 0.5), v - row / 1.15), soft)


def bricks(u: Plane, v: Plane, soft: float, mortar: float = 0.09) -> Plane:
    """1 on a brick, 0 on mortar; a brick is 2 cells long and 1 high."""
    along = u * 0.5 + np.floor(v) * 0.5
    to_joint = np.minimum(2 * _off_centre(along), _off_centre(v))
    return step(to_joint - mortar, soft)


def scales(u: Plane, v: Plane, soft: float) -> Plane:
    """Overlapping round tiles: 0 on their lower edges."""
    row = np.floor(v)
    ring = length(_off_centre(u + row * 0.5 + 0.5), v - row)
    return 1 - step(0.11 - np.abs(ring - 0.72), soft)


def herringbone(u: Plane, v: Plane, soft: float) -> Plane:
    """Veins that leave a middle line every 6 cells."""
    return stripes(v * 0.8 + 3 * _off_centre(u / 6), v, soft, 0.3)


def weave(u: Plane, v: Plane, soft: float) -> Plane:
    over = checker(u, v, soft)
    return over * stripes(u * 3, v, 3 * soft) + (1 - over) * stripes(v * 3, u, 3 * soft)


def rings(u: Plane, v: Plane, soft: float) -> Plane:
    return stripes(length(u, v), v, soft)


def spokes(u: Plane, v: Plane, soft: float) -> Plane:
    """Rays from the origin, 12 of them."""
    turn = np.arctan2(v, u) * np.float32(12 / (2 * np.pi))
    return step(0.2 - _off_centre(turn), 0.12)


Pattern = Callable[[Plane, Plane, float], Plane]
PATTERNS: tuple[Pattern, ...] = (
    stripes,
    checker,
    dots,
    bricks,
    scales,
    herringbone,
    weave,
    rings,
    spokes,
)


@dataclass(frozen=True)
class Palette:
    """The preferred colours of one thing or one whole scene. hue: 0 to 1. spread: of hues."""

    hue: float
    spread: float
    saturation: float

    @classmethod
    def draw(cls, rng: Rng) -> Palette:
        return cls(rng.random(), rng.choice((0.03, 0.08, 0.2)).item(), rng.beta(1.6, 3.2))

    def colour(self, rng: Rng, value: float | None = None) -> Colour:
        """(3, 1, 1). value: brightness of the strongest channel as displayed, 0 to 1."""
        hue = (self.hue + self.spread * rng.standard_normal()) % 1.0
        saturation = min(0.8, self.saturation * rng.uniform(0.4, 1.4))
        displayed = colorsys.hsv_to_rgb(hue, saturation, value or rng.uniform(0.2, 0.95))
        return np.array(displayed, np.float32).reshape(3, 1, 1) ** np.float32(GAMMA)

    def pair(self, rng: Rng, contrast: float = 0.6) -> tuple[Colour, Colour]:
        """Two distinct colours: a dark and a light one, in either order.

        contrast: their largest difference in brightness, 0 to 1.
        """
        dark = rng.uniform(0.15, 0.6)
        light = min(0.97, dark + contrast * rng.uniform(0.35, 1))
        values = (dark, light) if rng.random() < 0.5 else (light, dark)
        return self.colour(rng, values[0]), self.colour(rng, values[1])


def surface(
    u: Plane, v: Plane, pixel: float, rng: Rng, palette: Palette, contrast: float = 0.6
) -> Colour:
    """(3, H, W) of a random material without class: grain, mottling or one of the patterns.

    u, v: coordinates in units of about half the thing's size. pixel: size of a pixel in them.
    """
    first, second = palette.pair(rng, contrast)
    kind = rng.random()
    if kind < 0.3:
        longest = int(rng.choice((16, 32, 64, 128)))
        share = noise(u.shape, rng, longest=longest, roughness=rng.uniform(0.5, 0.9))
        share = step(share, rng.uniform(0.6, 4))
    elif kind < 0.45:
        stretch = int(rng.integers(3, 9))
        share = step(noise(u.shape, rng, longest=64, roughness=0.8, stretch=stretch), 3)
    else:
        pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
        turn, frequency = rng.uniform(0, np.pi), rng.uniform(2, 8)
        c, s = frequency * float(np.cos(turn)), frequency * float(np.sin(turn))
        across, down = c * u - s * v, s * u + c * v
        if rng.random() < 0.6:
            bend = np.float32(rng.uniform(0.1, 0.5)) * noise(u.shape, rng, longest=128)
            across, down = across + bend, down + bend
        share = pattern(across, down, 1.3 * pixel * frequency)
        share *= np.float32(rng.uniform(0.4, 1))
    colour = mix(first, second, share)
    mottling = noise(u.shape, rng, longest=32, roughness=0.85)
    colour *= np.clip(1 + np.float32(rng.uniform(0.05, 0.25)) * mottling, 0.2, 2)
    return colour


def _region(u: Plane, v: Plane, rng: Rng) -> Plane:
    """A signed plane, positive inside a random part of the picture: a side, a band, patches."""
    kind = rng.random()
    ragged = noise(u.shape, rng, longest=128, roughness=rng.uniform(0.3, 0.7))
    if kind < 0.4:
        return 0.3 * (ragged - np.float32(rng.uniform(-0.3, 0.8)))
    turn = rng.uniform(0, 2 * np.pi)
    across = np.float32(np.cos(turn)) * u + np.float32(np.sin(turn)) * v
    across += np.float32(rng.uniform(0, 0.15)) * ragged - np.float32(rng.uniform(-0.6, 0.6))
    if kind < 0.75:
        return across
    return np.float32(rng.uniform(0.1, 0.4)) - np.abs(across)


def background(size: int, rng: Rng, palette: Palette) -> Colour:
    """(3, size, size): a patchwork of surfaces with uneven brightness."""
    v, u = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    pixel = 2 / size
    contrast = rng.uniform(0.15, 0.5)
    colour = surface(u, v, pixel, rng, palette, contrast)
    for _ in range(int(rng.integers(1, 5))):
        inside = _region(u, v, rng)
        cover = step(inside, pixel * 1.5)
        # Regions overlap: each one darkens the ground just outside it.
        colour *= 1 - np.float32(0.35) * np.clip(1 + inside * 12, 0, 1) * (1 - cover)
        local = palette if rng.random() < 0.7 else Palette.draw(rng)
        colour += cover * (surface(u, v, pixel, rng, local, contrast) - colour)
    uneven = noise(u.shape, rng, longest=128, roughness=0.4)
    colour *= np.clip(1 + np.float32(rng.uniform(0.05, 0.3)) * uneven, 0.3, 2)
    return colour
