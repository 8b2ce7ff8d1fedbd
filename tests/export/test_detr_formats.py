"""d-fine and rt-detr: their files, and the printed code, which is run as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from dupr_cli.artifacts.weights import Weights, WeightsMetadata, layout_of
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import make_format
from dupr_cli.export.verification import features_of, verify
from dupr_cli.models.backbone import make_backbone

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

FILES = {
    ("d-fine", "timm:hgnetv2_b0"): "PPHGNetV2_B0_stage1.pth",
    ("d-fine", "transformers:hgnetv2_b2"): "PPHGNetV2_B2_stage1.pth",
    ("rt-detr", "transformers:rt_detr_resnet18"): "PResNet18_d.pth",
    ("rt-detr", "timm:resnet50d"): "PResNet50_d.pth",
    ("rt-detr", "resnet50"): "PResNet50_b.pth",
    ("rt-detr", "resnet18"): None,
}


def weights_of(architecture: str) -> Weights:
    torch.manual_seed(0)
    backbone = make_backbone(architecture)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.5)
    metadata = WeightsMetadata(layout_of(architecture), architecture, (0.4,) * 3, (0.2,) * 3, 64)
    return Weights("w", metadata, backbone.state_dict())


@pytest.mark.parametrize(("name", "architecture"), FILES)
def test_files_and_printed_code(
    name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, chosen = weights_of(architecture), make_format(name)
    chosen.write(weights, tmp_path, "other")
    file = FILES[name, architecture]
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {
        "config.json", "model.safetensors", "preprocessor_config.json", *([file] if file else [])
    }  # fmt: skip
    assert verify(chosen, weights, tmp_path).features_compared

    monkeypatch.chdir(tmp_path)
    blocks = chosen.usage(weights, "")
    assert [language for language, _ in blocks] == (["yaml"] if file else []) + ["python"]
    # The detector as printed, but smaller: only its backbone is looked at.
    code = blocks[-1][1].replace("Config(\n", "Config(\n    decoder_layers=2, d_model=32,\n", 1)
    names: dict[str, object] = {}
    exec(compile(code, "printed", "exec"), names)
    detector = names["detector"]
    assert isinstance(detector, nn.Module)
    images = torch.randn(1, 3, 64, 96)
    inner = detector.get_submodule("model.backbone.model").eval()
    with torch.no_grad():
        maps: list[Tensor] = inner(images).feature_maps
        expected = list(features_of(weights, images).values())[1:]
    for level, ours in zip(maps, expected, strict=True):
        assert float((level - ours).abs().max() / ours.abs().max()) <= 1e-5


def test_d_fines_file_is_timms_state_dict(tmp_path: Path) -> None:
    """D-FINE's HGNetv2 was derived from timm's; timm, without its classifier, is the oracle."""
    weights = weights_of("transformers:hgnetv2_b4")
    make_format("d-fine").write(weights, tmp_path, "other")
    state = torch.load(tmp_path / "PPHGNetV2_B4_stage1.pth", weights_only=True)
    whole = timm.create_model("hgnetv2_b4", num_classes=0).state_dict()
    expected = {name for name in whole if not name.startswith("head.")}
    assert state.keys() == expected
    assert all(state[name].shape == whole[name].shape for name in expected)


def test_a_corrupted_file_is_caught(tmp_path: Path) -> None:
    weights = weights_of("timm:hgnetv2_b0")
    chosen = make_format("d-fine")
    chosen.write(weights, tmp_path, "other")
    file = tmp_path / "PPHGNetV2_B0_stage1.pth"
    state = torch.load(file, weights_only=True)
    state["stem.stem1.conv.weight"][0, 0, 0, 0] += 1
    torch.save(state, file)
    with pytest.raises(RunError, match=r"stem\.stem1\.conv\.weight changed"):
        verify(chosen, weights, tmp_path)
    state["stem.stem9.weight"] = state.pop("stem.stem1.conv.weight")
    torch.save(state, file)
    with pytest.raises(RunError, match="1 tensors are missing"):
        verify(chosen, weights, tmp_path)


@pytest.mark.parametrize(("name", "architecture", "message"), [
    ("d-fine", "resnet18", "D-FINE has HGNetV2 as its backbone"),
    ("rt-detr", "timm:hgnetv2_b0", "RT-DETR has ResNets and ResNet-D"),
    ("transformers", "timm:resnet18d", "transformers has no network of the tensors"),
])  # fmt: skip
def test_other_networks_are_refused(
    name: str, architecture: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make_format(name).write(weights_of(architecture), tmp_path, "other")
    assert list(tmp_path.iterdir()) == []
