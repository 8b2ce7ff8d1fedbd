"""A backbone inside a detector: all of it arrives and computes the same, or it is said why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from dupr_cli.artifacts.weights import WeightsMetadata, layout_of, read_weights, write_weights
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export import load_into
from dupr_cli.export.arrival import Arrival
from dupr_cli.export.target import check_in
from dupr_cli.models.backbone import fitted, make_backbone
from tests.support.command_line import dupr

transformers: Any = pytest.importorskip("transformers")
Write = Callable[[str], Path]

# The detectors of transformers, as small as they get, with the parts that weights go into whole.
SMALL = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "encoder_attention_heads": 2,
    "decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2, "num_queries": 10,
    "decoder_in_channels": [32, 32, 32], "num_denoising": 4, "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A weights file of a random network, with statistics of norms that are not the first ones."""

    def written(architecture: str) -> Path:
        torch.manual_seed(0)
        backbone = make_backbone(architecture)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
        metadata = WeightsMetadata(
            layout_of(architecture), architecture, (0.5,) * 3, (0.2,) * 3, 64
        )
        file = tmp_path / f"{architecture.replace(':', '-')}.safetensors"
        write_weights(file, backbone.state_dict(), metadata)
        return file

    return written


def detector(name: str, frozen_norms: bool = True) -> nn.Module:
    """A detector of transformers with three levels of the backbone `transformers:NAME`."""
    backbone = make_backbone(f"transformers:{name}")
    shape = {**backbone.config, "out_features": None, "out_indices": [2, 3, 4]}  # type: ignore[dict-item]
    kind = "DFine" if name.startswith("hgnet") else "RTDetrV2"
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.AutoConfig.for_model(**shape),
        encoder_in_channels=list(backbone.channels.values())[1:],  # type: ignore[operator]
        freeze_backbone_batch_norms=frozen_norms, **SMALL,
    )  # fmt: skip
    torch.manual_seed(1)
    made: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return made


@pytest.mark.parametrize(("architecture", "name"), [
    ("transformers:rt_detr_resnet18", "rt_detr_resnet18"),
    ("transformers:hgnetv2_b0", "hgnetv2_b0"),
    ("timm:hgnetv2_b0", "hgnetv2_b0"),
    ("resnet18", "resnet18"),
])  # fmt: skip
@pytest.mark.parametrize("frozen_norms", [True, False])
def test_weights_arrive_in_rt_detr_and_d_fine(
    write: Write, architecture: str, name: str, frozen_norms: bool
) -> None:
    model, file = detector(name, frozen_norms), write(architecture)
    found = load_into(model, file)
    weights = read_weights(str(file)).tensors
    counted = [k for k in weights if not k.endswith("num_batches_tracked")]
    assert found.tensors == (len(counted) if frozen_norms else len(weights))
    assert (found.place, found.left_out) == ("model.backbone.model.", [])
    assert found.levels == ["res2", "res3", "res4", "res5"]
    assert found.max_difference < 1e-5
    # The detector runs and learns with them.
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    loss = model.train()(torch.randn(1, 3, 64, 64), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_norms_of_levels_that_a_detector_does_not_use_are_left_out(write: Write) -> None:
    found = load_into(detector("swin_tiny"), write("transformers:swin_tiny"))
    assert all("hidden_states_norms.stage1" in name for name in found.left_out)
    assert len(found.left_out) == 2
    assert found.levels == ["res3", "res4", "res5"]


def torchvision_detector() -> nn.Module:
    made: nn.Module = torchvision.models.get_model(
        "retinanet_resnet50_fpn", weights=None, weights_backbone=None
    )
    return made


@pytest.mark.parametrize(("architecture", "make", "place"), [
    ("resnet50", torchvision_detector, "backbone.body."),
    ("transformers:resnet50", torchvision_detector, "backbone.body."),
    ("resnet18", lambda: timm.create_model("resnet18", features_only=True), ""),
    ("timm:test_convnext", lambda: timm.create_model("test_convnext", features_only=True), ""),
    # ultralytics wraps torchvision's networks in this way.
    ("resnet18", lambda: nn.ModuleDict({"model": nn.ModuleList([nn.ModuleDict({"m": nn.Sequential(
        *list(torchvision.models.resnet18().children())[:-2])})])}), "model.0.m."),
])  # fmt: skip
def test_weights_arrive_in_other_libraries(
    write: Write, architecture: str, make: Callable[[], nn.Module], place: str
) -> None:
    model, file = make(), write(architecture)
    if place == "model.0.m.":
        inner: Any = model
        inner = inner["model"][0]["m"]
        found = load_into(inner, file)
        assert found.place == ""
    else:
        found = load_into(model, file)
        assert found.place == place
    assert found.levels == ["res2", "res3", "res4", "res5"]
    assert found.max_difference < 1e-5


def test_nothing_changes_unless_everything_fits(write: Write) -> None:
    model = detector("rt_detr_resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for architecture, message in (
        ("transformers:rt_detr_resnet34", "At best"),
        ("timm:test_convnext", "No tensor has a name and shape that fits"),
    ):
        with pytest.raises(UsageError, match=message):
            load_into(model, write(architecture))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_several_places_are_named(write: Write) -> None:
    """As in a detector that keeps a moving average of itself."""
    file = write("resnet18")
    model = nn.ModuleDict({k: make_backbone("resnet18") for k in ("model", "ema")})
    with pytest.raises(UsageError, match=r"2 places of the model \(ema\., model\.\)"):
        load_into(model, file)
    found = load_into(model, file, place="ema.")
    assert found.place == "ema."
    state, weights = model.state_dict(), read_weights(str(file)).tensors
    assert torch.equal(state["ema.conv1.weight"], weights["conv1.weight"])
    assert not torch.equal(state["model.conv1.weight"], weights["conv1.weight"])


def test_a_network_that_computes_something_else_is_found(write: Write) -> None:
    """All names and shapes fit, but the strides are elsewhere, as in Caffe's ResNets."""
    model = torchvision.models.resnet50()
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    with pytest.raises(RunError, match=r"computes other features than dupr.*res3"):
        load_into(model, write("resnet50"))


def test_the_module_keeps_its_mode_and_its_hooks(write: Write) -> None:
    model = torchvision.models.resnet18()
    model.layer1.eval()
    load_into(model, write("resnet18"))
    assert model.training
    assert not model.layer1.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> tuple[Path, Path]:
    """A detector of transformers that was saved with the weights inside, and the weights."""
    file, model = write("transformers:rt_detr_resnet18"), detector("rt_detr_resnet18")
    load_into(model, file)
    saved: Any = model
    saved.save_pretrained(tmp_path / "detector")
    return tmp_path / "detector", file


def checked(target: object, file: Path) -> Arrival:
    return check_in(str(target), fitted(read_weights(str(file))))


def test_a_saved_detector_holds_them(folder: tuple[Path, Path], tmp_path: Path) -> None:
    target, file = folder
    assert checked(target, file).levels == ["res2", "res3", "res4", "res5"]
    assert checked(target / "model.safetensors", file).tensors == 115
    torch.save({"model": load_file(target / "model.safetensors")}, tmp_path / "whole.pth")
    assert checked(tmp_path / "whole.pth", file).place == "model.backbone.model."
    done = dupr("export", file, "--check", target, "--check", target / "config.json", "--json")
    arrivals = json.loads(done.stdout)["arrivals"]
    assert [of["tensors"] for of in arrivals] == [115, 115]


def test_one_corrupted_tensor_or_name_is_caught(folder: tuple[Path, Path], tmp_path: Path) -> None:
    target, file = folder
    name = "model.backbone.model.encoder.stages.2.layers.1.layer.0.convolution.weight"
    state = load_file(target / "model.safetensors")
    state[name][0, 0, 0, 0] += 1
    save_file(state, tmp_path / "corrupted.safetensors")
    with pytest.raises(RunError, match=rf"114 of 115 tensors .*{name}"):
        checked(tmp_path / "corrupted.safetensors", file)
    state[name.replace("layer.0", "layer.9")] = state.pop(name)
    save_file(state, tmp_path / "renamed.safetensors")
    with pytest.raises(UsageError, match=rf"At best 114 fit.*{name} is missing"):
        checked(tmp_path / "renamed.safetensors", file)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    done = dupr("export", file, "--check", target, code=1)
    assert "hold the weights" in " ".join(done.stderr.split())


def test_a_detector_from_a_configuration_alone_holds_none(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    """The mistake that AutoConfig invites: the folder of the weights gives a shape, not values."""
    target, file = folder
    settings = transformers.AutoConfig.from_pretrained(target)
    model = transformers.AutoModelForObjectDetection.from_config(settings)
    model.save_pretrained(tmp_path / "random")
    done = dupr("export", file, "--check", tmp_path / "random", code=1)
    message = " ".join(done.stderr.split())
    assert "built from a configuration holds random values" in message
    assert "load_into" in message


@pytest.mark.parametrize(("target", "message"), [
    ("yolo26n", "nor a detector of torchvision (fasterrcnn_"),
    ("missing.pth", "this file does not exist"),
    ("missing.json", "there is no missing.json"),
    ("fasterrcnn_resnet50_fpn", "At best"),
])  # fmt: skip
def test_what_cannot_be_checked_is_said(write: Write, target: str, message: str) -> None:
    done = dupr("export", write("resnet18"), "--check", target, code=2)
    assert message in " ".join(done.stderr.split())


def test_pickled_weights_of_a_detector_are_not_taken_for_none(
    folder: tuple[Path, Path],
) -> None:
    target, file = folder
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    done = dupr("export", file, "--check", target, code=2)
    assert "its weights are pickled" in " ".join(done.stderr.split())


def test_no_library_is_imported_that_was_not_given(write: Write) -> None:
    file = write("resnet18")
    code = f"""
import sys
import torchvision
from dupr_cli.export import load_into
print(load_into(torchvision.models.resnet18(), {str(file)!r}).tensors)
print([name for name in ("transformers", "timm", "onnx", "ultralytics") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["120", "[]"]


def test_check_writes_nothing(write: Write, tmp_path: Path) -> None:
    done = dupr("export", write("resnet18"), "--check", "x", "--out", tmp_path / "o", code=2)
    assert "--check writes nothing" in " ".join(done.stderr.split())
