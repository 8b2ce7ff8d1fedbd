"""safetensors: one file in the names of the network's own library, for any network.

It is dupr's weights file; for torchvision's networks the format `torchvision` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dupr_cli import __version__
from dupr_cli.artifacts.hub_weights import EXPORTED
from dupr_cli.artifacts.weights import Weights, read_safetensors, write_weights
from dupr_cli.export.formats import Loaded
from dupr_cli.export.formats.safetensors_files import load_strictly, renamed_back
from dupr_cli.models.backbone import as_backbone, make_backbone


class SafetensorsFormat:
    name = "safetensors"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        write_weights(folder / EXPORTED, weights.tensors, weights.metadata)

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        backbone = make_backbone(weights.metadata.architecture)
        load_strictly(backbone, self.tensors(weights, folder), "dupr")
        return Loaded(as_backbone(backbone.eval())(images), f"dupr {__version__}")

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return renamed_back(weights, read_safetensors(folder / EXPORTED)[0], lambda name: name)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return [
            (
                "python",
                f"""from dupr_cli.export import load_into

# detector: any module that holds a {weights.metadata.architecture}, with its names
print(load_into(detector, "{place}{EXPORTED}"))""",
            )
        ]
