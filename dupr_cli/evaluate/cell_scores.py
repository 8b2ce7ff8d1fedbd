"""Scores of the cells of a feature map, and their place among the pixels of an image.

Cell i is centred at `first_centre + i * stride` pixels (models/backbone.py). Pixels between the
centres get linear mixtures of their neighbours' scores; those beyond the last centre get its. With
ResNets this is `align_corners` on images of 16 n + 1 pixels, such as MoCo's crops of 513; resizing
the map to the size of the image would move it by half a cell. It needs nothing of torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width, pixels


@dataclass(frozen=True)
class CellScores:
    """Scores of one image. values: (C, h, w), the cells of padding included. size: height and width
    of the image that the network saw, pixels. stride, first_centre: pixels."""

    values: Tensor
    size: Size
    stride: int
    first_centre: float

    def at_pixels(self, size: Size | None = None) -> Tensor:
        """(C, height, width): scores at the centres of the pixels of the image, or of the same
        image resized to `size`."""
        height, width = size or self.size
        # Scores stay float32, whatever the precision of the convolutions is.
        rows = _mixture(height, self.size[0], self.values.shape[1], self)
        columns = _mixture(width, self.size[1], self.values.shape[2], self)
        with torch.autocast(self.values.device.type, enabled=False):
            return rows @ self.values.float() @ columns.T


def _mixture(wanted: int, given: int, cells: int, scores: CellScores) -> Tensor:
    """(wanted, cells): what each cell contributes to each of the wanted pixels along one side.

    given: pixels along that side of the image that the network saw.
    """
    device = scores.values.device
    centres = (torch.arange(wanted, device=device, dtype=torch.float64) + 0.5) * (given / wanted)
    places = ((centres - scores.first_centre) / scores.stride).clamp(0, cells - 1)
    distance = (places[:, None] - torch.arange(cells, device=device)).abs()
    return (1 - distance).clamp(min=0).float()
