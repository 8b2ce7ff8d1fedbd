"""torchvision: a safetensors file with the state dict of torchvision.models.resnetXX without fc.

It is also dupr's own weights file. The backbones of torchvision's detectors have the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from dupr_cli.artifacts.hub_weights import EXPORTED
from dupr_cli.artifacts.weights import Weights, read_safetensors, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.export.formats import HubFolder, Loaded
from dupr_cli.export.formats.safetensors_files import load_strictly, renamed_back

FILE = EXPORTED


class TorchvisionFormat:
    name = "torchvision"
    top = False

    def write(self, weights: Weights, folder: Path, license_name: str) -> None:
        if weights.metadata.layout != self.name:
            raise UsageError(
                f"--to torchvision: the weights are of a {weights.metadata.architecture}, which "
                f"torchvision lacks. Give --to {weights.metadata.layout}."
            )
        write_weights(folder / FILE, weights.tensors, weights.metadata)

    def load(self, weights: Weights, folder: Path, images: Tensor) -> Loaded:
        # Here, because torchvision also loads torch's compiler, which no dry run needs.
        import torchvision
        from torchvision.models.feature_extraction import create_feature_extractor

        model = torchvision.models.get_model(weights.metadata.architecture, weights=None)
        model.fc = nn.Identity()
        channels = weights.metadata.input.channels
        if channels != 3:
            model.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        tensors, _ = read_safetensors(folder / FILE)
        by = f"torchvision {torchvision.__version__}"
        load_strictly(model, tensors, by)
        layers = {f"layer{n}": f"res{n + 1}" for n in range(1, 5)}
        return Loaded(create_feature_extractor(model.eval(), layers)(images), by)

    def tensors(self, weights: Weights, folder: Path) -> dict[str, Tensor]:
        return renamed_back(weights, read_safetensors(folder / FILE)[0], lambda name: name)

    def usage(self, weights: Weights, place: str) -> Sequence[tuple[str, str]]:
        return _blocks(weights, f'"{place}{FILE}"', "")

    def hub_usage(self, weights: Weights, hub: HubFolder) -> Sequence[tuple[str, str]]:
        revision = f', revision="{hub.revision}"' if hub.revision else ""
        fetched = f'file = hf_hub_download("{hub.repository}", "{hub.folder}{FILE}"{revision})\n'
        return _blocks(weights, "file", fetched)


def _blocks(weights: Weights, file: str, fetched: str) -> Sequence[tuple[str, str]]:
    """file: the path of the weights, as code. fetched: a line that downloads it, or nothing."""
    architecture, taken = weights.metadata.architecture, weights.metadata.input
    # A network for other images than RGB has another first convolution.
    first = (
        f"model.conv1 = torch.nn.Conv2d(\n"
        f"    {taken.channels}, 64, kernel_size=7, stride=2, padding=3, bias=False\n)\n"
        if taken.channels != 3
        else ""
    )
    download = "from huggingface_hub import hf_hub_download\n" if fetched else ""
    blocks = [
        (
            "python",
            f"""import torch
import torchvision
{download}from safetensors.torch import load_file

{fetched}model = torchvision.models.{architecture}(weights=None)
{first}model.fc = torch.nn.Identity()
model.load_state_dict(load_file({file}), strict=True)""",
        )
    ]
    if architecture == "resnet50" and taken.pixels is None:
        blocks.append(
            (
                "python",
                f"""import torchvision
{download}from safetensors.torch import load_file

{fetched}detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
    weights=None, weights_backbone=None, trainable_backbone_layers=5
)
detector.backbone.body.load_state_dict(load_file({file}), strict=True)""",
            )
        )
    return blocks
