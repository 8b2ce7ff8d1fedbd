"""export: the file loads where it should, and nothing half-right gets a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dupr_cli import export
from dupr_cli.artifacts.run import CheckpointState, write_checkpoint
from dupr_cli.artifacts.weights import Weights, WeightsMetadata, read_weights, write_weights
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export import torchvision_layout
from dupr_cli.recipe import ExportRecipe, load_recipe

RECIPE = load_recipe(ExportRecipe, "default")


def make_run(folder: Path, architecture: str) -> dict[str, torch.Tensor]:
    """A run directory with one checkpoint; returns the query encoder's backbone."""
    torch.manual_seed(0)
    query, key = ResNetBackbone(architecture), ResNetBackbone(architecture)
    query.train()(torch.randn(4, 3, 64, 64))  # statistics that are not the initial ones
    model = {f"query.backbone.{n}": t for n, t in query.state_dict().items()}
    model |= {f"key.backbone.{n}": t for n, t in key.state_dict().items()}
    state = CheckpointState(5, architecture, [0.4] * 3, [0.2] * 3, 64, "d", {})
    write_checkpoint(folder, state, model, {}, keep=1)
    return query.state_dict()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_exported_backbone_is_torchvisions(architecture: str, tmp_path: Path) -> None:
    expected = make_run(tmp_path / "run", architecture)
    result = export.run(RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors")
    tensors = load_file(result.path)
    model = torchvision.models.get_model(architecture)
    model.fc = nn.Identity()
    model.load_state_dict(tensors, strict=True)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert result.max_difference <= 1e-6
    with safe_open(result.path, framework="pt") as file:
        header = file.metadata()
    assert header["architecture"] == architecture
    assert header["layout"] == "torchvision"
    assert header["step"] == "5"


def test_exported_file_feeds_torchvisions_detector(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet50")
    export.run(RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors")
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None
    )
    body = detector.backbone.body
    body.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)


def test_key_encoder_on_request_and_a_second_export_is_the_same_file(tmp_path: Path) -> None:
    query = make_run(tmp_path / "run", "resnet18")
    keys = load_recipe(ExportRecipe, "default", ["encoder=key"])
    export.run(keys, str(tmp_path / "run"), tmp_path / "k.safetensors")
    assert not torch.equal(
        load_file(tmp_path / "k.safetensors")["conv1.weight"], query["conv1.weight"]
    )
    for name in ("a", "b"):
        export.run(RECIPE, str(tmp_path / "run"), tmp_path / f"{name}.safetensors")
    export.run(RECIPE, str(tmp_path / "a.safetensors"), tmp_path / "c.safetensors")
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in "abc"}) == 1


def test_file_in_the_way_is_kept_without_overwrite(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    out = tmp_path / "b.safetensors"
    out.write_text("precious")
    with pytest.raises(UsageError, match="a file is there"):
        export.run(RECIPE, str(tmp_path / "run"), out)
    assert out.read_text() == "precious"
    export.run(RECIPE, str(tmp_path / "run"), out, overwrite=True)
    assert read_weights(str(out)).metadata.step == 5


def test_corrupted_tensor_is_caught_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "resnet18")
    write = write_weights

    def corrupt(path: Path, tensors: dict[str, torch.Tensor], metadata: WeightsMetadata) -> None:
        write(
            path,
            {**tensors, "layer3.0.conv1.weight": tensors["layer3.0.conv1.weight"] * 1.01},
            metadata,
        )

    monkeypatch.setattr(torchvision_layout, "write_weights", corrupt)
    with pytest.raises(RunError, match="loaded back into torchvision, the features differ"):
        export.run(RECIPE, str(tmp_path / "run"), tmp_path / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    metadata = WeightsMetadata("torchvision", "resnet50", (0.5,) * 3, (0.2,) * 3, 64)
    wrong = Weights("w", metadata, ResNetBackbone("resnet18").state_dict())
    with pytest.raises(UsageError, match="the weights do not fit a resnet50"):
        torchvision_layout.write(wrong, tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []
