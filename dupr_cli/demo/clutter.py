"""Clutter of the scenes: things without a class, with textures that a class might have."""

from __future__ import annotations

import numpy as np

from dupr_cli.demo import textures
from dupr_cli.demo.canvas import Canvas, Light, Pose, Sprite, convex, line
from dupr_cli.demo.textures import TURN, Palette, Plane, Rng, length


def _pebble(canvas: Canvas, rng: Rng) -> Plane:
    """A blob with a wavy edge."""
    around = np.arctan2(canvas.v, canvas.u)
    edge: Plane = np.full(canvas.shape, 0.8, np.float32)
    for wave in (2, 3, 5):
        swing, phase = np.float32(rng.uniform(0, 0.3 / wave)), rng.uniform(0, TURN)
        edge += swing * np.cos(wave * around + phase)
    return (length(canvas.u, canvas.v) - edge) * np.float32(0.8)


def _shard(canvas: Canvas, rng: Rng) -> Plane:
    """A convex polygon with 3 to 6 corners."""
    count = int(rng.integers(3, 7))
    turns = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (TURN / count)
    corners = [(float(np.cos(t)), float(np.sin(t))) for t in turns]
    return convex(canvas.u, canvas.v, *corners)


def _twig(canvas: Canvas, rng: Rng) -> Plane:
    """A bent line, sometimes forked."""
    ys = np.linspace(-1, 1, 4)
    points = [(rng.uniform(-0.3, 0.3), float(y)) for y in ys]
    width = rng.uniform(0.03, 0.09)
    twig = line(canvas.u, canvas.v, *points, width=width, taper=width * 0.25)
    if rng.random() < 0.5:
        tip = (float(rng.choice((-1, 1))) * rng.uniform(0.3, 0.6), rng.uniform(-0.9, -0.2))
        twig = np.minimum(twig, line(canvas.u, canvas.v, points[2], tip, width=width * 0.6))
    return twig


def _hoop(canvas: Canvas, rng: Rng) -> Plane:
    """A ring, whole or open."""
    radius = length(canvas.u, canvas.v)
    width = rng.uniform(0.06, 0.2)
    ring = np.abs(radius - (0.95 - width)) - width
    hoop: Plane = np.maximum(ring, canvas.v - rng.uniform(-0.2, 1.2))
    return hoop


def draw_clutter(side: float, rng: Rng, palette: Palette, light: Light) -> Sprite:
    """A pebble, shard, twig or hoop. side: approximate longest side of its box, pixels."""
    shape, extent = (
        (_pebble, (1.0, 1.0)),
        (_shard, (1.0, 1.0)),
        (_twig, (0.5, 1.0)),
        (_hoop, (1.0, 1.0)),
    )[int(rng.choice(4, p=(0.35, 0.3, 0.2, 0.15)))]
    pose = Pose(
        side=side,
        angle=rng.uniform(-np.pi, np.pi),
        squeeze=rng.uniform(0.5, 1.0),
        shear=rng.uniform(-0.3, 0.3),
    )
    canvas = Canvas(pose, extent, rng)
    colour = textures.surface(canvas.u, canvas.v, canvas.pixel, rng, palette)
    canvas.paint(shape(canvas, rng), colour, bevel=rng.uniform(0.05, 0.5))
    return canvas.sprite(light, rng.uniform(0, 0.2))
