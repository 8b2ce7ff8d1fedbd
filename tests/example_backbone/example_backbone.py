"""A detector's own backbone as a family of dupr's: `model.backbone: example:small`.

`Trunk` stands for the network of some detector, with names of its own (`p3.0.weight`); dupr only
wraps it, and its tensors keep those names in checkpoints and exports.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.models.library import LibraryBackbone
from dupr_cli.recipe.base import LEVELS, Level

WIDTHS = {"small": (8, 16, 24, 32), "large": (16, 32, 48, 64)}


class Trunk(nn.Module):
    """Images (N, C, H, W) to maps of stride 4, 8, 16 and 32."""

    def __init__(self, widths: Sequence[int], in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 2, 2)
        before = widths[0]
        for number, width in enumerate(widths, 2):
            block = nn.Sequential(nn.Conv2d(before, width, 2, 2), nn.BatchNorm2d(width), nn.SiLU())
            setattr(self, f"p{number}", block)
            before = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        x = self.stem(images)
        for number in range(2, 6):
            x = maps[f"p{number}"] = getattr(self, f"p{number}")(x)
        return maps


class ExampleBackbone(LibraryBackbone):
    def __init__(self, architecture: str, in_channels: int = 3) -> None:
        """architecture: example:small or example:large. in_channels: of an image."""
        widths = WIDTHS.get(architecture.removeprefix("example:"))
        if widths is None:
            raise UsageError(f"model.backbone: {architecture} is none of {', '.join(WIDTHS)}.")
        trunk = Trunk(widths, in_channels)
        super().__init__(architecture, trunk, (4, 8, 16, 32), widths, in_channels)

    def forward(
        self, images: Tensor, levels: Collection[Level] = LEVELS, last: Level = "res5"
    ) -> dict[Level, Tensor]:
        maps = self.network(images)
        return {v: maps[v.replace("res", "p")] for v in self.levels if v in levels and v <= last}
