"""What a network sees: the first three principal components of each level as red, green and blue.

The components are those of all cells of all given images together, so that one colour means the
same in every picture of a level. The sign of a component is fixed: its largest coefficient is
positive, so that the picture does not depend on how the components were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dupr_cli.artifacts.pixel_formats import AnyImage, as_picture
from dupr_cli.datasets.tensors import as_tensor
from dupr_cli.inspect.sheet import Panel, letterboxed, sheet, write_picture
from dupr_cli.models.compared import ComparedWeights
from dupr_cli.models.frozen import FrozenBackbone, normalised_batch
from dupr_cli.recipe.base import Level

_RANGE = (1.0, 99.0)  # percentiles of a component that become 0 and 255
_COMPONENTS = 3


@dataclass(frozen=True)
class Features:
    """explained: share of the variance in the three components, percent by level."""

    path: str
    shows: list[str]
    size: int
    explained: dict[str, float]


def draw_features(
    path: Path,
    taken: ComparedWeights,
    frozen: FrozenBackbone,
    images: Sequence[tuple[str, AnyImage]],
    size: int,
) -> Features:
    """Write a PNG with one row per image. size: pixels of the longer side that the network sees."""
    levels = frozen.shape.levels
    maps = [_maps(frozen, image, size, levels) for _, image in images]
    coloured: dict[Level, list[NDArray[np.uint8]]] = {}
    explained: dict[str, float] = {}
    for level in levels:
        coloured[level], explained[level] = principal_colours([of[level] for of in maps])
    rows = []
    for number, (name, image) in enumerate(images):
        picture = as_picture(image)
        first, _, _, _ = letterboxed(picture)
        row: list[Panel] = [(first, f"{name}, {picture.width} x {picture.height} pixels")]
        for level in levels:
            colours = Image.fromarray(coloured[level][number])
            # Cells are shown as they are; smoothing would suggest more detail than there is.
            shown = colours.resize(picture.size, Image.Resampling.NEAREST)
            cells = f"{colours.width} x {colours.height} cells"
            row.append((letterboxed(shown)[0], f"{level}: {cells}"))
        rows.append(row)
    heads = ["image", *(f"{v}: {explained[v]:.0f} % of the variance" for v in levels)]
    title = (
        f"{taken.architecture}, {taken.loaded}, images of {size} pixels\n"
        f"first three principal components as red, green and blue"
    )
    write_picture(sheet(title, heads, rows), path)
    return Features(str(path), [name for name, _ in images], size, explained)


def _maps(
    frozen: FrozenBackbone, image: AnyImage, size: int, levels: Sequence[Level]
) -> dict[Level, Tensor]:
    """The maps (h, w, C) of an image, whose longer side becomes `size` pixels."""
    scale = size / max(image.size)
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = as_tensor(image.resize(sides, Image.Resampling.BILINEAR))
    batch = normalised_batch(
        [pixels], frozen.mean[0], frozen.std[0], max(frozen.shape.strides.values())
    )
    found = {}
    for level, features in frozen.maps_of_normalised(batch, levels).items():
        stride = frozen.shape.strides[level]
        width, height = (-(-side // stride) for side in sides)  # without the padding
        found[level] = features[0, :, :height, :width].permute(1, 2, 0).cpu().clone()
    return found


def principal_colours(maps: Sequence[Tensor]) -> tuple[list[NDArray[np.uint8]], float]:
    """Maps (h, w, C) to pictures (h, w, 3), and the share of the variance in them, percent.

    A component without variance, and one that there is no room for, is grey.
    """
    cells = torch.cat([values.flatten(0, 1) for values in maps]).double()
    centred = cells - cells.mean(0)
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:_COMPONENTS]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = centred @ (directions * largest.sign()).T  # (cells, up to 3)
    variance = strengths.square()
    total = float(variance.sum())
    explained = 100 * float(variance[:_COMPONENTS].sum()) / total if total else 0.0
    colours = np.full((len(cells), _COMPONENTS), 127, dtype=np.uint8)
    smallest = 1e-6 * float(strengths[0]) if total else 0.0
    for component in range(scores.shape[1]):
        if float(strengths[component]) <= smallest:
            continue
        values = scores[:, component].numpy()
        low, high = np.percentile(values, _RANGE)
        if high > low:
            shares = ((values - low) / (high - low)).clip(0, 1)
            colours[:, component] = (255 * shares + 0.5).astype(np.uint8)
    pictures, first = [], 0
    for values in maps:
        height, width = values.shape[:2]
        pictures.append(colours[first : first + height * width].reshape(height, width, -1))
        first += height * width
    return pictures, explained
