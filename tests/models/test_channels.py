"""Networks of any number of channels, and which of them can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dupr_cli.artifacts.pixel_formats import RGB_INPUT, NetworkInput, PixelFormat
from dupr_cli.artifacts.weights import WeightsMetadata, write_weights
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detectors import Target, build_detector
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.compared import open_compared, taking
from dupr_cli.runtime.parallel import World
from tests.support.recipes import detection_recipe
from tests.support.weights import random_weights


@pytest.mark.parametrize("architecture", ["resnet18", "timm:test_resnet", "timm:test_convnext"])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_every_family_takes_any_number_of_channels(architecture: str, channels: int) -> None:
    backbone = make_backbone(architecture, channels).eval()
    assert as_backbone(backbone).in_channels == channels
    maps = backbone(torch.zeros(1, channels, 64, 64))
    assert tuple(maps) == as_backbone(backbone).levels
    assert as_backbone(backbone).after("res4")


def test_the_stem_of_a_resnet_starts_as_torchvisions() -> None:
    """Kaiming's normal distribution by the fan out, which does not depend on the channels."""
    torch.manual_seed(0)
    usual, other = (
        make_backbone("resnet18", channels).state_dict()["conv1.weight"] for channels in (3, 50)
    )
    assert float(other.std()) == pytest.approx(float(usual.std()), rel=0.05)
    assert other.shape == (64, 50, 7, 7)


def written(file: Path, channels: int, limits: tuple[float, float]) -> str:
    metadata = WeightsMetadata(
        "torchvision", "resnet18", (0.3,) * channels, (0.1,) * channels, 64, "stored",
        input_range=limits,
    )  # fmt: skip
    write_weights(file, make_backbone("resnet18", channels).state_dict(), metadata)
    return str(file)


def test_random_weights_take_the_input_of_the_others(tmp_path: Path) -> None:
    address = written(tmp_path / "a.safetensors", 2, (0, 100))
    inputs = [one.input for one in open_compared(["none", address])]
    assert inputs == [NetworkInput((0.3,) * 2, (0.1,) * 2, PixelFormat(2, (0, 100)))] * 2


def test_weights_for_different_images_are_not_compared(tmp_path: Path) -> None:
    first = written(tmp_path / "a.safetensors", 2, (0, 100))
    for other in (
        written(tmp_path / "b.safetensors", 3, (0, 100)),
        written(tmp_path / "c.safetensors", 2, (0, 200)),
        str(random_weights(tmp_path / "d.safetensors")),
    ):
        with pytest.raises(UsageError, match="Evaluate them separately"):
            open_compared([first, "none", other])


def test_data_decides_only_when_all_weights_are_random(tmp_path: Path) -> None:
    taken = NetworkInput((0.5,), (0.2,), PixelFormat(1, (0, 255)))
    assert [one.input for one in taking(open_compared(["none"]), lambda: taken)] == [taken]
    assert [one.input for one in taking(open_compared(["none"]), lambda: None)] == [RGB_INPUT]
    address = written(tmp_path / "a.safetensors", 2, (0, 100))
    compared = open_compared([address])
    assert taking(compared, lambda: taken) == compared


@pytest.mark.parametrize("model", ["faster-rcnn-c4", "fcos-fpn"])
def test_detectors_train_on_any_number_of_channels(model: str) -> None:
    sizes = [8, 16, 32] if model == "fcos-fpn" else [32]
    recipe = detection_recipe()
    changed = recipe.detector.model_copy(
        update={"model": model, "anchor_sizes": sizes, "pyramid_channels": 32, "norm": "frozen"}
    )
    taken = NetworkInput((0.5,) * 5, (0.2,) * 5, PixelFormat(5, (0, 1)))
    detector, _ = build_detector(
        recipe.model_copy(update={"detector": changed}), "resnet18", 2, None, 0,
        World(torch.device("cpu")), taken,
    )  # fmt: skip
    target = Target(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1]))
    images = [torch.rand(5, 64, 64), torch.rand(5, 64, 64)]
    losses = detector.train().losses(images, [target, target])
    assert all(bool(loss.isfinite()) for loss in losses.values())
