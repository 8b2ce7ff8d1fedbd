"""Networks for other images than RGB, in the layouts that can hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.weights import Weights, WeightsMetadata, read_weights, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.export.formats import make_format
from dupr_cli.export.verification import verify
from dupr_cli.models.backbone import make_backbone


def weights(channels: int) -> Weights:
    torch.manual_seed(0)
    backbone = make_backbone("resnet18", channels)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # tame, so that rounding does not grow
            torch.nn.init.constant_(module.weight, 0.2)
    mean = tuple(0.1 * (1 + number) for number in range(channels))
    metadata = WeightsMetadata(
        "torchvision", "resnet18", mean, mean, 224, "stored", input_range=(0.0, 4095.0)
    )
    return Weights("w", metadata, dict(backbone.state_dict()))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "name", ["torchvision", "timm", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_the_library_computes_the_same_features(name: str, channels: int, tmp_path: Path) -> None:
    chosen = make_format(name)
    chosen.write(weights(channels), tmp_path, "other")
    assert verify(chosen, weights(channels), tmp_path).features_compared


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_the_shown_lines_load_the_file(name: str, tmp_path: Path) -> None:
    """What the model card and the terminal tell people to do, for five channels."""
    chosen = make_format(name)
    chosen.write(weights(5), tmp_path, "other")
    (block,) = [text for language, text in chosen.usage(weights(5), f"{tmp_path}/")]
    scope: dict[str, object] = {}
    exec(block, scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    model.eval()(torch.zeros(1, 5, 64, 64))
    assert torch.equal(model.state_dict()["conv1.weight"], weights(5).tensors["conv1.weight"])


@pytest.mark.parametrize("name", ["detectron2", "mmdetection", "transformers"])
@pytest.mark.parametrize("channels", [3, 5])
def test_loaders_of_rgb_are_not_given_other_images(
    name: str, channels: int, tmp_path: Path
) -> None:
    """Three channels of 16 bits are not RGB of 8 bits either."""
    with pytest.raises(UsageError, match=r"read RGB of 8 bits.*values from 0 to 4095"):
        make_format(name).write(weights(channels), tmp_path, "other")
    assert not list(tmp_path.iterdir())


def test_the_header_keeps_the_format(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", weights(2).tensors, weights(2).metadata)
    metadata = read_weights(str(tmp_path / "w.safetensors")).metadata
    assert metadata == weights(2).metadata
    assert metadata.input.pixels == PixelFormat(2, (0.0, 4095.0))


def test_the_header_of_rgb_is_that_of_before() -> None:
    metadata = WeightsMetadata("torchvision", "resnet18", (0.5,) * 3, (0.2,) * 3, 64)
    assert "input_range" not in metadata.to_header()
    assert metadata.to_header()["dupr_format_version"] == "1"
    assert weights(3).metadata.to_header()["dupr_format_version"] == "2"
    assert metadata.input.pixels is None
