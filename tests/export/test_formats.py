"""Every format in the library it is for: strict loading, equal features, damage that is caught."""

from __future__ import annotations

import io
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck

from dupr_cli.artifacts.weights import Weights, WeightsMetadata
from dupr_cli.errors import RunError, UsageError
from dupr_cli.export.formats import folders_of, make_format
from dupr_cli.export.verification import verify

pytestmark = pytest.mark.slow

ARCHITECTURES = ["resnet18", "resnet34", "resnet50", "resnet101"]
FORMATS = ["torchvision", "timm", "transformers", "detectron2", "mmdetection", "onnx"]


@cache
def network(architecture: str) -> torch.nn.Module:
    """torchvision's own with measured statistics and, as after training, tame residual branches:
    an untrained network lets rounding grow from block to block."""
    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.get_model(architecture, weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
        if isinstance(module, Bottleneck | BasicBlock):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            torch.nn.init.constant_(last.weight, 0.2)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 160, 160))
    return model.eval()


def weights_of(architecture: str, dtype: torch.dtype = torch.float32) -> Weights:
    tensors = {
        name: tensor.clone().to(dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in network(architecture).state_dict().items()
        if not name.startswith("fc.")
    }
    metadata = WeightsMetadata("torchvision", architecture, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 224)
    return Weights("w", metadata, tensors)


@torch.no_grad()
def expected_features(architecture: str, images: Tensor) -> list[Tensor]:
    layers = {f"layer{n}": f"{n}" for n in range(1, 5)}
    features = create_feature_extractor(network(architecture), layers)(images)
    return [features[f"{n}"] for n in range(1, 5)]


def written(name: str, weights: Weights, folder: Path) -> Path:
    folder.mkdir()
    make_format(name).write(weights, folder, "cc-by-4.0")
    return folder


@pytest.fixture(scope="module")
def of_resnet18(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Copies what a format writes for a ResNet-18: ONNX takes seconds to write it."""

    @cache
    def first(name: str) -> Path:
        return written(name, weights_of("resnet18"), tmp_path_factory.mktemp(name) / "out")

    return lambda name, folder: shutil.copytree(first(name), folder)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for level, other in zip(found, expected, strict=True):
        assert float((level - other).abs().max() / other.abs().max()) <= 1e-5


IMAGES = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_torchvision(architecture: str, tmp_path: Path) -> None:
    folder = written("torchvision", weights_of(architecture), tmp_path / "out")
    model = torchvision.models.get_model(architecture)
    model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(folder / "backbone.safetensors"), strict=True)
    with torch.no_grad():
        found = model.eval()(IMAGES)
    close([found], [expected_features(architecture, IMAGES)[3].mean((2, 3))])


def test_torchvisions_detector_runs_with_it(tmp_path: Path) -> None:
    folder = written("torchvision", weights_of("resnet50"), tmp_path / "out")
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64
    )
    tensors = load_file(folder / "backbone.safetensors")
    detector.backbone.body.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        detector.eval()
        close([detector.backbone.body(IMAGES)["3"]], [expected_features("resnet50", IMAGES)[3]])
        (found,) = detector([torch.rand(3, 64, 96)])
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_timm(architecture: str, tmp_path: Path) -> None:
    timm = import_module("timm")
    folder = written("timm", weights_of(architecture), tmp_path / "out")
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    levels = timm.create_model(
        f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)
    ).eval()
    expected = expected_features(architecture, IMAGES)
    with torch.no_grad():
        close(levels(IMAGES), expected)
        close([whole(IMAGES)], [expected[3].mean((2, 3))])
    config = timm.data.resolve_model_data_config(whole)
    assert list(config["mean"]) == [0.4, 0.5, 0.6]
    assert list(config["std"]) == [0.1, 0.2, 0.3]
    assert list(config["input_size"]) == [3, 224, 224]
    assert whole.pretrained_cfg["license"] == "cc-by-4.0"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers(architecture: str, tmp_path: Path) -> None:
    transformers = import_module("transformers")
    folder = written("transformers", weights_of(architecture), tmp_path / "out")
    model, report = transformers.ResNetBackbone.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        close(list(model.eval()(IMAGES).feature_maps), expected_features(architecture, IMAGES))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]


# One of each kind of block; the others are longer, and as slow to export as they are long.
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_onnx_of_any_batch_and_size(
    architecture: str, of_resnet18: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    onnxruntime = import_module("onnxruntime")
    if architecture == "resnet18":
        folder = of_resnet18("onnx", tmp_path / "out")
    else:
        folder = written("onnx", weights_of(architecture), tmp_path / "out")
    session = onnxruntime.InferenceSession(str(folder / "backbone.onnx"))
    for images in (IMAGES, torch.randn(1, 3, 96, 224), torch.randn(3, 3, 101, 75)):
        found = [torch.from_numpy(level) for level in session.run(None, {"images": images.numpy()})]
        close(found, expected_features(architecture, images))


class PlainUnpickler(pickle.Unpickler):
    """What a pickle of plain arrays needs, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        assert module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode")
        return super().find_class(module, name)


def detectron2_table(blocks: list[int], convolutions: int) -> dict[str, int]:
    """Tensors of detectron2's ResNet and their dimensions, from its source."""
    names = {"stem.conv1": 4}
    for stage, count in enumerate(blocks):
        for block in range(count):
            prefix = f"res{stage + 2}.{block}"
            names |= {f"{prefix}.conv{n + 1}": 4 for n in range(convolutions)}
            if block == 0 and (stage > 0 or convolutions == 3):
                names[f"{prefix}.shortcut"] = 4
    norms = {
        f"{name}.norm.{part}": 1
        for name in names
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    return {**{f"{name}.weight": 4 for name in names}, **norms}


@pytest.mark.parametrize(
    ("architecture", "blocks", "convolutions"),
    [
        ("resnet18", [2, 2, 2, 2], 2),
        ("resnet34", [3, 4, 6, 3], 2),
        ("resnet50", [3, 4, 6, 3], 3),
        ("resnet101", [3, 4, 23, 3], 3),
    ],
)
def test_detectron2_has_the_tensors_of_its_resnet(
    architecture: str, blocks: list[int], convolutions: int, tmp_path: Path
) -> None:
    weights = weights_of(architecture)
    folder = written("detectron2", weights, tmp_path / "out")
    content = PlainUnpickler(io.BytesIO((folder / "backbone.pkl").read_bytes())).load()
    assert content["matching_heuristics"] is True
    arrays = content["model"]
    assert {name: array.ndim for name, array in arrays.items()} == detectron2_table(
        blocks, convolutions
    )
    kept = [n for n in weights.tensors if not n.endswith("num_batches_tracked")]
    assert Counter(a.tobytes() for a in arrays.values()) == Counter(
        weights.tensors[n].numpy().tobytes() for n in kept
    )
    original = weights.tensors["layer1.0.conv1.weight"].numpy()
    assert np.array_equal(arrays["res2.0.conv1.weight"], original)
    last = weights.tensors[f"layer4.1.bn{convolutions}.running_var"].numpy()
    assert np.array_equal(arrays[f"res5.1.conv{convolutions}.norm.running_var"], last)
    ((_, block),) = make_format("detectron2").usage(weights, "")
    config = yaml.safe_load(block)
    assert config["MODEL"]["PIXEL_MEAN"] == pytest.approx([102, 127.5, 153])
    assert config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False
    assert config["INPUT"]["FORMAT"] == "RGB"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mmdetection_has_torchvisions_names_under_backbone(
    architecture: str, tmp_path: Path
) -> None:
    weights = weights_of(architecture)
    folder = written("mmdetection", weights, tmp_path / "out")
    content = torch.load(folder / "backbone.pth", weights_only=True)
    assert set(content["state_dict"]) == {f"backbone.{name}" for name in weights.tensors}
    model = torchvision.models.get_model(architecture)
    model.fc = torch.nn.Identity()
    model.load_state_dict(
        {n.removeprefix("backbone."): t for n, t in content["state_dict"].items()}, strict=True
    )
    ((_, block),) = make_format("mmdetection").usage(weights, "")
    space: dict[str, Any] = {}
    exec(block, space)
    assert space["model"]["backbone"]["depth"] == int(architecture.removeprefix("resnet"))
    assert space["model"]["data_preprocessor"]["std"] == [25.5, 51.0, 76.5]


@pytest.mark.parametrize("name", FORMATS)
def test_verification_says_what_it_compared(
    name: str, of_resnet18: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    folder = of_resnet18(name, tmp_path / "out")
    verified = verify(make_format(name), weights_of("resnet18"), folder)
    assert verified.max_difference <= 1e-5
    by = {"detectron2": "names, shapes", "mmdetection": "names, shapes", "onnx": "onnxruntime 1"}
    assert verified.by.startswith(by.get(name, name))


def corrupted(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    name = next(n for n in tensors if n.endswith(ending))
    return {**tensors, name: tensors[name] * 1.01}


def corrupt_safetensors(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    ending = "layers.0.layer.0.convolution.weight"
    tensors = load_file(file)
    if not any(n.endswith(ending) for n in tensors):
        ending = "layer3.0.conv1.weight"
    save_file(corrupted(tensors, ending), file, metadata={"format": "pt"})


def corrupt_pth(folder: Path) -> None:
    content = torch.load(folder / "backbone.pth", weights_only=True)
    content["state_dict"] = corrupted(content["state_dict"], "layer3.0.conv1.weight")
    torch.save(content, folder / "backbone.pth")


def corrupt_bytes(folder: Path) -> None:
    data = bytearray((folder / "backbone.pkl").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "backbone.pkl").write_bytes(data)


def corrupt_onnx(folder: Path) -> None:
    onnx = import_module("onnx")
    model = onnx.load(folder / "backbone.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(largest.raw_data, dtype=np.float32) * np.float32(1.01)
    largest.raw_data = values.tobytes()
    onnx.save(model, folder / "backbone.onnx")


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("torchvision", corrupt_safetensors),
        ("timm", corrupt_safetensors),
        ("transformers", corrupt_safetensors),
        ("mmdetection", corrupt_pth),
        ("detectron2", corrupt_bytes),
        ("onnx", corrupt_onnx),
    ],
)
def test_one_corrupted_tensor_is_caught(
    name: str,
    corrupt: Callable[[Path], None],
    of_resnet18: Callable[[str, Path], Path],
    tmp_path: Path,
) -> None:
    folder = of_resnet18(name, tmp_path / "out")
    corrupt(folder)
    with pytest.raises(
        RunError, match=r"features differ|changed when read back|differs from the intended"
    ):
        verify(make_format(name), weights_of("resnet18"), folder)


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "mmdetection"])
def test_a_tensor_too_few_is_caught(name: str, tmp_path: Path) -> None:
    weights = weights_of("resnet18")
    folder = written(name, weights, tmp_path / "out")
    if name == "mmdetection":
        content = torch.load(folder / "backbone.pth", weights_only=True)
        content["state_dict"].popitem()
        torch.save(content, folder / "backbone.pth")
    else:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        del tensors[next(n for n in tensors if n.endswith("running_var"))]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"refuses the weights|does not load|missing"):
        verify(make_format(name), weights, folder)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_without_the_library_tensors_are_compared_and_it_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    weights = weights_of("resnet18")
    folder = written(name, weights, tmp_path / "out")
    verified = verify(make_format(name), weights, folder)
    assert not verified.features_compared
    assert verified.by == f"names, shapes and values only, because {name} is not installed"
    corrupt_safetensors(folder)
    with pytest.raises(RunError, match="changed when read back"):
        verify(make_format(name), weights, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers", "mmdetection"])
def test_half_the_size_is_verified_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = weights_of("resnet18", dtype)
    folder = written(name, weights, tmp_path / "out")
    assert verify(make_format(name), weights, folder).max_difference <= 1e-5
    assert sum(file.stat().st_size for file in folder.iterdir()) < 23e6


def test_onnx_in_half_precision_is_verified_within_its_rounding(tmp_path: Path) -> None:
    weights = weights_of("resnet18", torch.float16)
    folder = written("onnx", weights, tmp_path / "out")
    assert 0 < verify(make_format("onnx"), weights, folder).max_difference <= 2e-2


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = weights_of("resnet18")
    metadata = WeightsMetadata("torchvision", "wide_resnet50_2", (0.4,) * 3, (0.2,) * 3, 64)
    odd = Weights("w", metadata, weights.tensors)
    for name in ("transformers", "detectron2", "mmdetection"):
        with pytest.raises(UsageError, match=rf"--to {name}: .*wide_resnet50_2"):
            make_format(name).write(odd, tmp_path, "other")
    for name, problem in (("detectron2", "numpy has no bfloat16"), ("onnx", "lacks bfloat16")):
        with pytest.raises(UsageError, match=problem):
            make_format(name).write(weights_of("resnet18", torch.bfloat16), tmp_path, "other")
    assert list(tmp_path.iterdir()) == []


def test_where_several_formats_lie() -> None:
    assert folders_of([make_format("onnx")]) == {"onnx": ""}
    assert folders_of([make_format(n) for n in ("onnx", "timm")]) == {"onnx": "onnx/", "timm": ""}
    with pytest.raises(UsageError, match="this format does not exist; the formats are d-fine"):
        make_format("darknet")
