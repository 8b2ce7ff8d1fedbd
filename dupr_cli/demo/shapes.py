"""The things in the scenes: six classes, distinguished by their parts and their texture.

Every function paints one thing, upright, onto a canvas. The palette of colours reveals nothing
about the class; proportions, number and place of parts and the fineness of the texture vary between
individuals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dupr_cli.demo import textures
from dupr_cli.demo.canvas import Canvas, Light, Pose, Sprite, box, convex, ellipse, line
from dupr_cli.demo.textures import TURN, Colour, Palette, Plane, Rng, length, mix


def _mottled(canvas: Canvas, rng: Rng) -> Plane:
    """A factor around 1 that keeps surfaces from being flat."""
    grain = textures.noise(canvas.shape, rng, longest=32, roughness=0.8)
    factor: Plane = np.clip(1 + np.float32(rng.uniform(0.04, 0.2)) * grain, 0.3, 1.7)
    return factor


def beetle(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Head with feelers, shield, striped wing cases, six jointed legs."""
    u, v = canvas.u, canvas.v
    broad, long = rng.uniform(0.36, 0.5), rng.uniform(0.55, 0.66)
    legs, shield = palette.colour(rng, rng.uniform(0.1, 0.6)), palette.colour(rng)
    # It is mirrored at the middle; shifts along the body differ between the sides.
    side = np.abs(u)
    stride = v + np.float32(rng.uniform(-0.09, 0.09)) * np.sign(u)
    thick, reach = rng.uniform(0.03, 0.05), rng.uniform(0.2, 0.3)
    limbs = line(
        side, v, (0.05, -0.72), (0.2, -0.9), (rng.uniform(0.25, 0.5), -1.0), width=thick * 0.7
    )
    for root, lean in ((-0.3, -0.3), (0.1, 0.0), (0.4, 0.3)):
        knee = (broad + reach * 0.6, root + lean * 0.6 + rng.uniform(-0.06, 0.06))
        foot = (broad + reach * rng.uniform(1.0, 1.3), root + lean * 1.8 + rng.uniform(0.0, 0.15))
        leg = line(side, stride, (0.2, root), knee, foot, width=thick, taper=thick * 0.35)
        limbs = np.minimum(limbs, leg)
    canvas.paint(limbs, legs, bevel=0.04)
    canvas.paint(ellipse(u, v + 0.68, 0.2, 0.17), shield * 0.6, height=0.08, bevel=0.12)
    canvas.paint(ellipse(side - 0.14, v + 0.73, 0.06, 0.07), legs, height=0.15, bevel=0.05)
    collar = ellipse(u, v + 0.42, broad * rng.uniform(0.68, 0.85), 0.23)
    canvas.paint(collar, shield * _mottled(canvas, rng), height=0.1, bevel=0.2)
    first, second = palette.pair(rng)
    frequency, soft = rng.uniform(2.5, 6.0), 2 * canvas.pixel
    # The stripes run along the body or across it, bowed like the cases.
    bow = np.float32(rng.uniform(-0.5, 0.5)) * side * side
    lengthwise = side * (0.7 + 0.6 * (v + 0.8) ** 2) if rng.random() < 0.4 else v + bow
    bands = textures.stripes(
        lengthwise * frequency + rng.random(), v, soft * frequency, rng.uniform(0.35, 0.6)
    )
    cases = mix(first, second, bands) * _mottled(canvas, rng)
    cases *= 1 - 0.7 * np.clip(0.5 + (0.018 - side) / canvas.pixel, 0, 1)
    body = ellipse(u, v - 0.22, broad, long)
    canvas.paint(body, cases, height=0.12 - 0.04 * np.exp(-((side * 25) ** 2)), bevel=broad * 0.9)


def wheel(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Tyre with tread, rim, spokes with open gaps, hub."""
    u, v = canvas.u, canvas.v
    radius, around = length(u, v), np.arctan2(v, u)
    inner, hub = rng.uniform(0.68, 0.82), rng.uniform(0.11, 0.22)
    count = int(rng.integers(5, 13))
    # The angle from the middle of the nearest spoke, and the distance to that spoke's edge.
    share = around * np.float32(count / TURN) + np.float32(rng.random())
    away = (share - np.rint(share)) * np.float32(TURN / count)
    width = rng.uniform(0.03, 0.3 / count + 0.03)
    bowed = np.abs(np.sin(away)) * radius - width * (1 + rng.uniform(-0.4, 0.6) * radius)
    metal = palette.colour(rng)
    spokes = np.maximum(bowed, np.maximum(radius - inner, -np.cos(away)))
    canvas.paint(spokes, metal * _mottled(canvas, rng), bevel=0.04)
    dark, light = palette.pair(rng)
    lugs = int(rng.integers(20, 44))
    beat = np.cos(around * lugs)
    tread = np.clip(0.5 + 1.5 * beat, 0, 1) * np.clip((radius - 0.9) * 30, 0, 1)
    outer = radius - 1 + np.float32(rng.uniform(0.0, 0.03)) * (beat < 0)
    tyre = np.maximum(outer, inner - radius)
    rubber = mix(dark, light, 0.6 * tread) * _mottled(canvas, rng)
    canvas.paint(tyre, rubber, height=0.02, bevel=0.5 * (1 - inner))
    rim = np.abs(radius - inner) - rng.uniform(0.025, 0.05)
    canvas.paint(rim, palette.colour(rng), height=0.06, bevel=0.04)
    canvas.paint(radius - hub, metal * 0.8, height=0.05, bevel=hub * 0.6)
    canvas.paint(radius - hub * 0.4, light, height=0.1, bevel=hub * 0.3)


def fish(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Checkered body, gill and eye, forked tail and rayed fins."""
    u, v = canvas.u, canvas.v
    deep = rng.uniform(0.3, 0.46)
    first, second = palette.pair(rng)
    fin, ray = palette.pair(rng)
    # The body narrows towards the tail, on the right.
    spread = v / np.maximum(1 - 0.32 * np.clip(u + 0.1, -0.3, 1), 0.3)
    body = ellipse(u + 0.2, spread, 0.74, deep)
    fork, flare = rng.uniform(0.1, 0.35), rng.uniform(0.7, 1.1)
    tail = np.maximum(
        np.maximum(np.abs(v) - 0.05 - flare * (u - 0.46), 0.4 - u),
        u - rng.uniform(0.9, 1.0) + fork * (1 - np.minimum(np.abs(v) * 2.2, 1)),
    )
    fineness = rng.uniform(7, 12)
    rays = textures.stripes(
        np.arctan2(v, u - 0.2) * fineness, v, 0.35 + canvas.pixel * fineness, 0.4
    )
    rayed = mix(fin, ray, rays)
    canvas.paint(tail * 0.8, rayed, bevel=0.04)
    start, end, high = rng.uniform(-0.5, -0.3), rng.uniform(0.1, 0.35), rng.uniform(0.14, 0.3)
    sweep = textures.stripes((u - 0.4 * v) * fineness, v, 2 * canvas.pixel * fineness, 0.4)
    swept = mix(fin, ray, sweep)
    back = (start, -deep * 0.6), (end, -deep - high), (end + 0.12, -deep * 0.5)
    canvas.paint(convex(u, v, *back), swept, bevel=0.04)
    belly = (-0.25, deep * 0.7), (end + 0.05, deep * 0.5), (end, deep + high * 0.8)
    canvas.paint(convex(u, v, *belly), swept, bevel=0.04)
    frequency, turn = rng.uniform(4.5, 8.5), float(rng.choice((0.0, 0.25, 0.785)))
    c, s = frequency * float(np.cos(turn)), frequency * float(np.sin(turn))
    across, down = c * u - s * spread, s * u + c * spread
    squares = textures.checker(across + rng.random(), down, 1.5 * canvas.pixel * frequency)
    flank = mix(first, second, squares) * _mottled(canvas, rng)
    flank *= np.clip(1 + np.float32(rng.uniform(-0.1, 0.6)) * v, 0.4, 1.6)
    head = np.clip(0.5 + (-0.5 - u + 0.5 * spread * spread) / (2 * canvas.pixel), 0, 1)
    canvas.paint(body, mix(flank, palette.colour(rng), head), height=0.06, bevel=deep * 0.9)
    gill = np.maximum(np.abs(length(u + 0.68, v) - 0.24) - 0.018, -0.62 - u)
    canvas.paint(np.maximum(gill, body), first * 0.3, height=0.3, bevel=0.02)
    pectoral = ellipse(u + 0.2 + 0.4 * v, v - 0.08, 0.17, 0.08)
    canvas.paint(pectoral, swept, height=0.36, bevel=0.04)
    eye = length(u + 0.68, v + 0.07)
    size = rng.uniform(0.06, 0.09)
    canvas.paint(eye - size, palette.colour(rng, 0.95), height=0.3, bevel=0.03)
    canvas.paint(eye - size * 0.55, palette.colour(rng, 0.08), height=0.33, bevel=0.03)


def mushroom(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Spotted cap, gills under it, fibrous stem with a bulb and sometimes a ring."""
    u, v = canvas.u, canvas.v
    broad, high = rng.uniform(0.66, 0.9), rng.uniform(0.5, 0.85)
    thick, lean = rng.uniform(0.12, 0.22), rng.uniform(-0.15, 0.15)
    brim = rng.uniform(-0.15, 0.1)
    flesh, fibre = palette.pair(rng)
    bent = u - lean * (v - brim) ** 2
    widening = thick * (0.8 + rng.uniform(0.0, 0.7) * np.clip(v, 0, 1) ** 2)
    stem = np.maximum(np.abs(bent) - widening, np.maximum(v - 0.92 + bent * bent, brim - v))
    threads = textures.stripes(
        bent * rng.uniform(9, 14) + 0.3 * np.sin(v * 7), v, 0.6 + 9 * canvas.pixel, 0.5
    )
    canvas.paint(stem, mix(flesh, fibre, 0.5 * threads) * _mottled(canvas, rng), bevel=thick)
    if rng.random() < 0.5:
        skirt = ellipse(bent, v - brim - 0.3, thick * 1.7, 0.07)
        canvas.paint(skirt, flesh, height=0.12, bevel=0.06)
    open_ = rng.uniform(0.08, 0.2)
    under = ellipse(u, v - brim, broad * 0.96, open_)
    turn = np.arctan2((v - brim + 0.02) / open_, u / broad)
    gills = textures.stripes(turn * rng.uniform(5, 9), v, 0.3)
    canvas.paint(under, mix(flesh * 0.35, flesh * 0.9, gills), height=0.05, bevel=0.03)
    ground, spot = palette.pair(rng)
    # The lower edge of the cap bows down over the gills.
    lip = brim + rng.uniform(0.0, 0.5) * open_ * (1 - (u / broad) ** 2)
    pointed = rng.uniform(0.8, 1.25)
    dome = length(np.abs(u / broad) ** pointed, (v - brim) / high) - 1
    cap = np.maximum(dome * min(broad, high), v - lip)
    canvas.paint(cap, ground * _mottled(canvas, rng), height=0.12, bevel=min(broad, high) * 0.8)
    frequency, size = rng.uniform(2.2, 4.2), rng.uniform(0.24, 0.36)
    # The spots sit on a dome: they crowd towards its edge, one in each cell, off its middle.
    bulge = 1 / np.sqrt(np.clip(1.25 - np.clip(dome + 1, 0, 1) ** 2, 0.1, 2))
    x = (u * bulge * frequency + rng.random()).astype(np.float32)
    y = ((v - brim) * bulge * frequency * 1.2 + rng.random()).astype(np.float32)
    x += 0.5 * (np.rint(y) % 2)
    column, row = np.rint(x), np.rint(y)
    push = np.sin(column * 12.99 + row * 78.23) * 0.16
    spots = length(x - column - push, y - row + push) - size - push * 0.4
    inside = np.maximum(spots / (frequency * 1.3), cap + 0.01)
    canvas.paint(inside, spot, height=0.14 + 0.5 * np.clip(-dome, 0, 0.5), bevel=0.04)


def leaf(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Toothed or lobed blade with a middle rib and side veins, on a stalk."""
    u, v = canvas.u, canvas.v
    half = rng.uniform(0.3, 0.52)
    bent = u - rng.uniform(-0.25, 0.25) * (v - 0.3) ** 2
    side = np.abs(bent)
    share = np.clip((v + 1) / 1.68, 0, 1)
    swell = np.maximum(np.sin(np.pi * share ** rng.uniform(0.75, 1.4)), 0)
    width: Plane = half * swell ** rng.uniform(0.7, 1.1)
    teeth = rng.uniform(5, 8) if rng.random() < 0.4 else rng.uniform(9, 16)
    slope = rng.uniform(0.5, 1.2)
    phase = (v + slope * side) * np.float32(teeth * 0.55)
    saw = phase - np.floor(phase)
    width = width * (1 - rng.uniform(0.03, 2.2 / teeth) * saw)
    blade = np.maximum((side - width) * 0.85, np.maximum(-1 - v, v - 0.68))
    ground, vein = palette.pair(rng)
    stalk = line(bent, v, (0.0, 0.55), (rng.uniform(-0.12, 0.12), 1.0), width=0.035)
    canvas.paint(stalk, vein, bevel=0.03)
    thin = rng.uniform(0.14, 0.24)
    veins = textures.stripes(phase, v, 2 * canvas.pixel * teeth * 0.55, thin)
    rib = np.clip(0.5 + (0.03 * (1.2 - share) - side + 0.012) / (1.5 * canvas.pixel), 0, 1)
    lines = np.maximum(veins * np.float32(rng.uniform(0.6, 1)), rib)
    tissue: Colour = ground * _mottled(canvas, rng)
    # The leaf gets brown or pale edges and patches, as real leaves do.
    patches = textures.step(textures.noise(canvas.shape, rng, longest=64) - 1.1, 0.6)
    tissue = mix(tissue, palette.colour(rng), patches * np.float32(rng.uniform(0, 0.8)))
    quilt = 0.03 * np.cos(phase * np.float32(TURN)) + rng.uniform(-0.3, 0.3) * side
    canvas.paint(blade, mix(tissue, vein, lines), height=0.1 - quilt, bevel=0.06)


def house(canvas: Canvas, rng: Rng, palette: Palette) -> None:
    """Brick front under a gable, tiled roof, side wall, chimney, door and windows."""
    u, v = canvas.u, canvas.v
    corner = rng.uniform(0.0, 0.35)
    apex, eaves, far = rng.uniform(-0.85, -0.65), rng.uniform(-0.25, -0.05), 0.78
    ridge = (corner - 0.76) / 2
    brick, mortar = palette.pair(rng)
    frequency = rng.uniform(7.5, 12)
    soft = 1.6 * canvas.pixel * frequency
    courses = textures.bricks(u * frequency * 0.8, v * frequency, soft, rng.uniform(0.08, 0.14))
    wall = mix(mortar, brick, courses) * _mottled(canvas, rng)
    tile, gap = palette.pair(rng)
    tiled = textures.scales(u * frequency * 0.7, v * frequency * 0.7, soft)
    roof = mix(gap, tile, tiled) * _mottled(canvas, rng)
    stack = rng.uniform(ridge + 0.15, far - 0.25)
    chimney = box(u, v, stack, apex - rng.uniform(0.05, 0.15), stack + 0.15, eaves)
    canvas.paint(chimney, wall * 0.9, height=0.1, bevel=0.03)
    canvas.paint(box(u, v, corner, eaves, far - 0.05, 0.85), wall * 0.7, bevel=0.03)
    gable = convex(u, v, (-0.76, eaves), (ridge, apex), (corner, eaves))
    front = np.minimum(gable, box(u, v, -0.76, eaves - 0.02, corner, 0.9))
    canvas.paint(front, wall, height=0.05, bevel=0.03)
    shift = far - corner
    slope = (ridge, apex), (ridge + shift, apex), (far, eaves + 0.03), (corner, eaves + 0.03)
    canvas.paint(convex(u, v, *slope), roof, height=0.12, bevel=0.04)
    barge = line(
        u, v, (-0.82, eaves + 0.06), (ridge, apex), (corner + 0.04, eaves + 0.06), width=0.05
    )
    canvas.paint(barge, tile * 0.7, height=0.15, bevel=0.04)
    glass, frame = palette.pair(rng)
    middle = rng.uniform(-0.55, corner - 0.25)
    door = box(u, v, middle, 0.42, middle + 0.2, 0.89)
    canvas.paint(door - 0.03, frame, height=0.08, bevel=0.03)
    canvas.paint(door, palette.colour(rng) * np.clip(0.5 + np.abs(u - middle - 0.1) * 40, 0.4, 1))
    half = rng.uniform(0.07, 0.1)
    places = [(-0.55, 0.18), (corner - 0.2, 0.18), (corner + shift / 2, 0.25)]
    if rng.random() < 0.6:
        places.append((ridge, eaves - 0.08))
    if rng.random() < 0.5:
        places.append((corner + shift / 2, 0.62))
    panes = np.minimum.reduce([np.maximum(abs(u - x), abs(v - y)) - half for x, y in places])
    bars = np.minimum.reduce([np.minimum(abs(u - x), abs(v - y)) for x, y in places])
    canvas.paint(panes - 0.035, frame, height=0.09, bevel=0.03)
    canvas.paint(np.maximum(panes, 0.018 - bars), glass, height=0.05, bevel=0.02)


@dataclass(frozen=True)
class Kind:
    """Shape and pose of one class. extent: half axes, local units, of the ellipse that the thing
    roughly fills. turn: largest rotation either way, radians. squeeze: least width over height."""

    paint: Callable[[Canvas, Rng, Palette], None]
    extent: tuple[float, float]
    turn: float
    squeeze: float
    gloss: float


KINDS: dict[str, Kind] = {
    "beetle": Kind(beetle, (1.02, 1.12), np.pi, 0.8, 0.35),
    "fish": Kind(fish, (1.0, 0.75), 0.7, 0.85, 0.25),
    "house": Kind(house, (0.88, 1.02), 0.2, 0.8, 0.0),
    "leaf": Kind(leaf, (0.53, 1.02), np.pi, 0.75, 0.05),
    "mushroom": Kind(mushroom, (0.77, 0.9), 0.5, 0.8, 0.1),
    "wheel": Kind(wheel, (1.0, 1.0), np.pi, 0.5, 0.1),
}


def draw(name: str, side: float, rng: Rng, palette: Palette, light: Light) -> Sprite:
    """An individual of a class. side: longest side of its box, pixels, to about a tenth."""
    kind = KINDS[name]
    pose = Pose(
        side=side,
        angle=rng.uniform(-kind.turn, kind.turn),
        squeeze=rng.uniform(kind.squeeze, 1 / max(kind.squeeze, 0.8)),
        shear=rng.uniform(-0.2, 0.2),
        tilt=(rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)),
        mirrored=rng.random() < 0.5,
    )
    canvas = Canvas(pose, kind.extent, rng)
    kind.paint(canvas, rng, palette)
    return canvas.sprite(light, rng.uniform(0, kind.gloss))
