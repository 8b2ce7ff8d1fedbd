"""The two views of a batch, from the loader's pixels to what an encoder takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.phases import phase
from dupr_cli.views.augmentation import augment
from dupr_cli.views.geometry import shared_region_boxes
from dupr_cli.views.pairs import ViewPairBatch


@dataclass(frozen=True)
class View:
    """One view of each image of a batch, before augmentation.

    pixels: (N, 3, S, S) uint8, or (N, C, S, S) float32 of images that keep their channels, on the
    training device. parameters: (N, P) of the augmentation. boxes: (N, 4) shared region in view
    pixels. flips: (N,) bool. All but the pixels are on the CPU.
    """

    pixels: Tensor
    parameters: Tensor
    boxes: Tensor
    flips: Tensor

    def part(self, rows: slice) -> View:
        return View(self.pixels[rows], self.parameters[rows], self.boxes[rows], self.flips[rows])

    def exchange(self, order: Tensor, world: World) -> View:
        """This process's part of all processes' views in another order, see `World.exchange`.

        Pixels of RGB travel before they become floats, which takes a quarter of the bytes.
        """
        return View(
            *(
                world.exchange(t, order)
                for t in (self.pixels, self.parameters, self.boxes, self.flips)
            )
        )

    def for_encoder(
        self, method: MethodSection, memory_format: torch.memory_format
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's input: images (N, C, S, S) augmented and normalised, boxes, flips."""
        device = self.pixels.device
        with phase("augment"):
            images = augment(self.pixels, self.parameters, method.augmentation)
            images = images.contiguous(memory_format=memory_format)
        return (
            images,
            self.boxes.to(device, non_blocking=True),
            self.flips.to(device, non_blocking=True),
        )


def make_views(
    batch: ViewPairBatch, method: MethodSection, device: torch.device
) -> tuple[tuple[View, View], Tensor]:
    """Both views of a batch, and valid (N,) bool: which share enough for patches (CPU).

    Source: docs/method.md, "Views" and "Shared region".
    """
    flips = batch.flips
    boxes, valid = shared_region_boxes(
        batch.crops, flips, method.views.size, method.views.min_overlap
    )
    pixels = batch.views.to(device, non_blocking=True)
    first, second = (
        View(pixels[:, i], batch.parameters[:, i], boxes[:, i], flips[:, i]) for i in range(2)
    )
    return (first, second), valid
