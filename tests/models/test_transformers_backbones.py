"""transformers' backbones: shapes as published, configurations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.naming import names_elsewhere
from dupr_cli.models.transformers import _SHAPES, TransformersBackbone
from dupr_cli.recipe import PretrainRecipe, load_recipe

transformers = pytest.importorskip("transformers")


def shapes(architecture: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: t.shape for name, t in make_backbone(architecture).state_dict().items()}


@pytest.mark.parametrize(("ours", "theirs", "library"), [
    *((f"transformers:hgnetv2_b{size}", f"timm:hgnetv2_b{size}", "timm") for size in range(6)),
    *((f"transformers:resnet{depth}", f"resnet{depth}", "torchvision") for depth in (18, 34, 50)),
    ("timm:resnet50d", "transformers:rt_detr_resnet50", "transformers"),
    ("resnet101", "transformers:resnet101", "transformers"),
])  # fmt: skip
def test_the_same_network_of_two_libraries_has_the_same_tensors(
    ours: str, theirs: str, library: str
) -> None:
    """Each library is the oracle of the other: shapes under the other's names."""
    own = shapes(ours)
    names = names_elsewhere(ours, own)[library]
    assert {names[name]: shape for name, shape in own.items()} == shapes(theirs)


@pytest.mark.parametrize("name", _SHAPES)
def test_every_named_shape_has_all_levels(name: str) -> None:
    with torch.device("meta"):
        backbone = TransformersBackbone(f"transformers:{name}")
        maps = backbone.eval()(torch.zeros(1, 3, 96, 128))
    assert {level: tuple(m.shape) for level, m in maps.items()} == {
        level: (1, backbone.channels[level], 96 // stride, 128 // stride)
        for level, stride in backbone.strides.items()
    }
    assert list(backbone.strides.values()) == [4, 8, 16, 32]


def test_rt_detrs_published_shapes() -> None:
    """Parameters of the backbone of PekingU/rtdetr_r18vd and r50vd (RT-DETR's ResNet18vd, 50vd)."""
    for name, millions in (("rt_detr_resnet18", 11.20), ("rt_detr_resnet50", 23.53)):
        count = sum(p.numel() for p in make_backbone(f"transformers:{name}").parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.02)


def test_names_in_rt_detrs_repository() -> None:
    """Names from its presnet.py: the stem, both kinds of projection, a third convolution."""
    own = shapes("transformers:rt_detr_resnet50")
    names = names_elsewhere("transformers:rt_detr_resnet50", own)["rt-detr"]
    assert len(set(names.values())) == len(own)
    for inside, there in {
        "embedder.embedder.2.normalization.running_var": "conv1.conv1_3.norm.running_var",
        "encoder.stages.0.layers.0.shortcut.convolution.weight":
            "res_layers.0.blocks.0.short.conv.weight",
        "encoder.stages.3.layers.0.shortcut.1.normalization.bias":
            "res_layers.3.blocks.0.short.conv.norm.bias",
        "encoder.stages.2.layers.5.layer.2.convolution.weight":
            "res_layers.2.blocks.5.branch2c.conv.weight",
    }.items():  # fmt: skip
        assert names[inside] == there
    plain = names_elsewhere("resnet50", shapes("resnet50"))["rt-detr"]
    assert plain["conv1.weight"] == "conv1.conv1_1.conv.weight"
    assert plain["layer4.0.downsample.1.weight"] == "res_layers.3.blocks.0.short.norm.weight"


def test_weights_are_random_and_follow_the_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(make_backbone("transformers:resnet18").state_dict())
    name = "encoder.stages.1.layers.0.layer.0.convolution.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_a_cell_of_patches_is_centred() -> None:
    """ConvNeXt's first layer cuts patches; a ResNet's padded convolutions shift to the left."""
    centres = as_backbone(make_backbone("transformers:convnext_tiny")).first_centres
    assert all(abs(centres[v] - s / 2) < s / 12 for v, s in {"res2": 4, "res5": 32}.items())  # type: ignore[index]


def recipe(backbone: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", [f"model.backbone={backbone}"])


def test_a_configuration_takes_the_place_of_its_file(tmp_path: Path) -> None:
    inner = {"model_type": "resnet", "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    for name, content in (
        ("backbone", inner), ("detector", {"model_type": "d_fine", "backbone_config": inner}),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        for given in (folder, folder / "config.json"):
            found = recipe(f"transformers:{given}").model.backbone
            assert found == 'transformers:{"depths":[1,1,1,1],"model_type":"resnet"}'
            assert recipe(found).model.backbone == found


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"), ("[1]", "has no model_type"), ("{}", "no model_type"),
    (None, "cannot be read as JSON"),
])  # fmt: skip
def test_a_damaged_configuration_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        recipe(f"transformers:{file}")
    assert "model.backbone is transformers:" in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [
    ("resnet19", "Did you mean resnet1"),
    ('{"model_type":"bert"}', "cannot build a backbone"),
    ('{"model_type":"resnet","layer_type":"sideways"}', "cannot build a backbone"),
    ('{"model_type":"dinov2"}', "none of"),
])  # fmt: skip
def test_what_is_no_backbone_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_backbone(f"transformers:{name}")


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UsageError, match="keras:resnet50, which is not a backbone"):
        recipe("keras:resnet50")
    with pytest.raises(UsageError, match="no backbones of the family 'keras'"):
        make_backbone("keras:resnet50")


@pytest.mark.parametrize("name", [
    "hgnetv2_b0", "rt_detr_resnet18", "convnext_tiny", "swin_tiny", '{"model_type":"hgnet_v2"}',
])  # fmt: skip
def test_images_of_other_channels(name: str) -> None:
    with torch.device("meta"):
        backbone = make_backbone(f"transformers:{name}", 5).eval()
        maps = as_backbone(backbone)(torch.zeros(1, 5, 64, 64))
    assert as_backbone(backbone).in_channels == 5
    assert maps["res5"].shape[2:] == (2, 2)
