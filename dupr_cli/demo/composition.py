"""Sprites layered on a background, with shadows, and the camera that photographs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from dupr_cli.demo.canvas import Light, Sprite
from dupr_cli.demo.textures import GAMMA, TURN, Colour, Palette, Plane, Rng, background

# Of every labelled object, at least this share of its whole silhouette stays visible.
RECOGNISABLE = 0.25


@dataclass
class Placed:
    """An object in a scene. silhouette: (H, W) coverage. seen: the part that later layers left
    visible. area: of the whole silhouette, including outside the image, pixels."""

    name: str
    silhouette: Plane
    seen: Plane
    area: float


class Composition:
    """Layers over each other. light: (3, S, S), linear."""

    def __init__(self, size: int, rng: Rng, palette: Palette, sun: Light):
        self.size, self.rng, self.sun = size, rng, sun
        self.light: Colour = background(size, rng, palette)
        self.placed: list[Placed] = []
        self._softness = rng.uniform(0.01, 0.035) * size
        self._shadow = rng.uniform(0.25, 0.75)

    def put(self, sprite: Sprite, name: str | None = None, tries: int = 8) -> bool:
        """Put a thing in a random place; with a name it is a labelled object.

        Returns False, without a change, if every place tried would make an object unrecognisable.
        """
        height, width = sprite.coverage.shape
        area = float(sprite.coverage.sum())
        for _ in range(tries):
            # An object's middle is mostly well inside the image; clutter may touch the border.
            edge = 0.5 if name and self.rng.random() < 0.6 else 0.1
            slack = [min(0.5, edge * side / self.size) for side in (width, height)]
            x, y = (
                round(self.rng.uniform(s, 1 - s) * self.size - side / 2)
                for s, side in zip(slack, (width, height), strict=True)
            )
            cover = self._pasted(sprite.coverage, x, y)
            still_seen = [p.seen * (1 - cover) for p in self.placed]
            recognisable = all(
                float(seen.sum()) >= RECOGNISABLE * p.area
                for seen, p in zip(still_seen, self.placed, strict=True)
            )
            if recognisable and (name is None or float(cover.sum()) >= 0.4 * area):
                break
        else:
            return False
        for seen, placed in zip(still_seen, self.placed, strict=True):
            placed.seen = seen
        if name:
            self.placed.append(Placed(name, cover, cover, area))
        self._cast_shadow(sprite, x, y)
        self.light *= 1 - cover
        self.light += self._pasted(sprite.colour, x, y)
        return True

    def _pasted(self, planes: Plane, x: int, y: int) -> Plane:
        """(..., S, S): zeros with `planes` at x, y, cut at the border."""
        height, width = planes.shape[-2:]
        whole = np.zeros((*planes.shape[:-2], self.size, self.size), np.float32)
        left, top = max(0, -x), max(0, -y)
        right, bottom = min(width, self.size - x), min(height, self.size - y)
        if right > left and bottom > top:
            part = planes[..., top:bottom, left:right]
            whole[..., y + top : y + bottom, x + left : x + right] = part
        return whole

    def _cast_shadow(self, sprite: Sprite, x: int, y: int) -> None:
        """Darken the ground beside a thing, away from the light."""
        reach = 0.06 * max(sprite.coverage.shape) + 1
        to_x, to_y, _ = self.sun.direction
        shade = self._pasted(sprite.coverage, round(x - reach * to_x), round(y - reach * to_y))
        picture = Image.fromarray((shade * 255).astype(np.uint8))
        blurred = picture.filter(ImageFilter.BoxBlur(self._softness))
        self.light *= 1 - np.asarray(blurred, np.float32) * np.float32(self._shadow / 255)


def photograph(light: Colour, rng: Rng) -> Image.Image:
    """Photograph a scene: exposure, colour, blur and noise. light: (3, S, S), linear."""
    size = light.shape[-1]
    turn, depth = rng.uniform(0, TURN), rng.uniform(0.0, 0.45)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    uneven = ramp[None, :] * np.float32(depth * np.cos(turn)) + ramp[:, None] * np.float32(
        depth * np.sin(turn)
    )
    warm = rng.normal(0, 0.12)
    balance = np.exp([warm, rng.normal(0, 0.03), -warm]).astype(np.float32)
    # The exposure roughly follows the scene's brightness, and is off by up to half a stop.
    gain = (0.22 / float(light.mean())) ** 0.6 * 2 ** rng.uniform(-0.5, 0.5)
    light = light * (balance.reshape(3, 1, 1) * np.float32(gain) * (1 + uneven))
    # The display curve is a table over the square root, which spreads out the dark values: a power
    # for every pixel would take far longer.
    levels = np.sqrt(np.clip(light, 0, 1)) * np.float32(4095)
    table = (np.linspace(0, 1, 4096) ** 2) ** (rng.uniform(0.85, 1.2) / GAMMA) * 255
    displayed = table.astype(np.float32)[levels.astype(np.int32)].transpose(1, 2, 0)
    if rng.random() < 0.4:
        picture = Image.fromarray(displayed.astype(np.uint8))
        radius = rng.uniform(0.3, 0.9) * size / 160
        displayed = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32)
    if rng.random() < 0.6:
        grain = rng.standard_normal((size, size, 3), np.float32)
        displayed = displayed + np.float32(rng.uniform(1, 7)) * grain
    return Image.fromarray(np.clip(displayed + 0.5, 0, 255).astype(np.uint8))
