"""Backbones against the libraries that they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dupr_cli.artifacts.weights import Weights, WeightsMetadata, layout_of
from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import (
    as_backbone,
    load_backbone,
    make_backbone,
    require_levels,
)
from dupr_cli.models.batch_norm import group_batch_norms, ungroup_batch_norms
from dupr_cli.models.measured import measured_first_centres
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe import PretrainRecipe, load_recipe
from dupr_cli.recipe.base import LEVEL_STRIDES, Level
from tests.support.recipes import TINY

STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_features_equal_torchvisions(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    reference = torchvision.models.get_model(name, weights=None).eval()
    ours = make_backbone(name).eval()
    state = reference.state_dict()
    ours.load_state_dict({n: t for n, t in state.items() if not n.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64)
    expected = create_feature_extractor(reference, {v: k for k, v in STAGES.items()})(x)
    found = ours(x)
    assert found.keys() == expected.keys()
    for level, tensor in found.items():
        assert torch.equal(tensor, expected[level])
        assert as_backbone(ours).channels[level] == tensor.shape[1]


TIMMS = [
    "resnet18d", "convnext_atto", "hgnetv2_b0", "cspdarknet53", "mobilenetv4_conv_small",
    "efficientnet_b0", "swin_tiny_patch4_window7_224",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMMS)
def test_features_and_names_equal_timms(name: str) -> None:
    whole = timm.create_model(name, num_classes=0).eval()
    ours = make_backbone(f"timm:{name}").eval()
    own, theirs = ours.state_dict(), whole.state_dict()
    assert own.keys() <= theirs.keys()
    assert not any(key.startswith(("stages", "layers", "blocks")) for key in theirs - own.keys())
    ours.load_state_dict({key: theirs[key] for key in own})
    x = torch.randn(1, 3, 224, 224)
    levels = cast(Any, whole).forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    expected = {224 // features.shape[-1]: features for features in levels}
    found = ours(x, ("res3", "res5"))
    assert list(found) == ["res3", "res5"]
    for level, features in found.items():
        stride = as_backbone(ours).strides[level]
        assert torch.allclose(features, expected[stride], atol=1e-5)
        assert features.shape[1] == as_backbone(ours).channels[level]


@pytest.mark.parametrize("name", TIMMS[:-1])
def test_earlier_names_of_timms_networks_are_read(name: str) -> None:
    """Earlier versions held timm's lists of features, which flatten their first level of names."""
    earlier = timm.create_model(name, features_only=True).eval()
    tensors = {f"network.{key}": tensor for key, tensor in earlier.state_dict().items()}
    ours = make_backbone(f"timm:{name}").eval()
    weights = Weights("w", _metadata(f"timm:{name}"), tensors)
    assert load_backbone(ours, weights) == len(tensors)
    x = torch.randn(1, 3, 64, 64)
    expected = {64 // features.shape[-1]: features for features in earlier(x)}
    for level, features in ours(x).items():
        assert torch.allclose(features, expected[as_backbone(ours).strides[level]], atol=1e-5)
    holder = nn.ModuleDict({"backbone": make_backbone(f"timm:{name}")})
    holder.load_state_dict({f"backbone.{key}": tensor for key, tensor in tensors.items()})
    assert torch.equal(next(holder.parameters()), next(ours.parameters()))


def _metadata(architecture: str) -> WeightsMetadata:
    return WeightsMetadata(
        layout_of(architecture), architecture, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 224
    )


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18d", "timm:hgnetv2_b0"])
def test_what_a_level_does_not_need(name: str) -> None:
    backbone = make_backbone(name)
    unneeded = as_backbone(backbone).after("res4")
    parameters = {id(p) for module in unneeded for p in module.parameters()}
    last: Tensor = backbone(torch.randn(2, 3, 64, 64), ("res4",), "res4")["res4"]
    torch.autograd.backward(last.sum())
    without = {id(p) for p in backbone.parameters() if p.grad is None}
    assert parameters == without
    assert parameters
    assert backbone.training


def test_transformers_take_images_of_any_size() -> None:
    backbone = make_backbone("timm:swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 96, 160))
    shapes = {level: tuple(features.shape[2:]) for level, features in maps.items()}
    assert shapes == {"res2": (24, 40), "res3": (12, 20), "res4": (6, 10), "res5": (3, 5)}


def test_a_network_with_one_stride_has_one_level() -> None:
    backbone = make_backbone("timm:vit_tiny_patch16_224")
    assert as_backbone(backbone).levels == ("res4",)
    with pytest.raises(UsageError, match="has the levels res4, but not res3, res5"):
        require_levels(backbone, ["res3", "res4", "res5"], "detector.model")


def test_timms_batch_norms_keep_their_activation_in_groups() -> None:
    plain = make_backbone("timm:efficientnet_b0")
    grouped = make_backbone("timm:efficientnet_b0")
    grouped.load_state_dict(plain.state_dict())
    group_batch_norms(grouped, 1)
    x = torch.randn(4, 3, 64, 64)
    for a, b in zip(plain(x).values(), grouped(x).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    ungroup_batch_norms(grouped)
    kinds = [[type(m) for m in network.modules()] for network in (plain, grouped)]
    assert kinds[0] == kinds[1]
    # Of two groups each sees its own statistics.
    group_batch_norms(grouped, 2)
    parts = [make_backbone("timm:efficientnet_b0") for _ in range(2)]
    for part in parts:
        part.load_state_dict(plain.state_dict())
    reset = make_backbone("timm:efficientnet_b0")
    reset.load_state_dict(plain.state_dict())
    expected = [part(half)["res3"] for part, half in zip(parts, x.chunk(2), strict=True)]
    assert torch.allclose(grouped(x)["res3"], torch.cat(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:convnxt_atto", "has no convnxt_atto. Similar: convnext_atto"),
        ("timm:vit_small_patch14_dinov2", r"strides \[14, 14, 14\]; none of \[4, 8, 16, 32\]"),
    ],
)
def test_what_timm_cannot_give_is_said(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_backbone(name)


def test_a_timm_backbone_trains(tmp_path: Path, tiny_shards: Path) -> None:
    from dupr_cli import pretrain

    recipe = load_recipe(
        PretrainRecipe,
        "dupr-r18-cpu-smoke",
        [*TINY, "model.backbone=timm:resnet18d", "train.steps=2"],
    )
    result = pretrain.run(recipe, str(tiny_shards), tmp_path / "run")
    assert result is not None
    assert result.steps == 2


def test_stages_after_the_last_level_are_not_trained() -> None:
    from dupr_cli.pretrain.method import Dupr

    recipe = load_recipe(
        PretrainRecipe,
        "dupr-r18-cpu-smoke",
        [*TINY, "method.image.weights={}", "method.patch.weights={res4: 1.0}"],
    )
    backbone = Dupr(recipe).query.backbone
    assert isinstance(backbone, nn.Module)
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"conv1", "bn1", "layer1", "layer2", "layer3"}


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda: ResNetBackbone("resnet18"), lambda stride: 0.5),
        (lambda: make_backbone("timm:resnet18"), lambda stride: 0.5),
        (lambda: make_backbone("timm:convnext_atto"), lambda stride: stride / 2),
    ],
    ids=["padded", "timm padded", "patches"],
)
def test_cells_are_centred_where_the_layout_says(
    make: Callable[[], nn.Module], first: Callable[[int], float]
) -> None:
    measured = measured_first_centres(make)
    for level, stride in LEVEL_STRIDES.items():
        assert measured[level] == pytest.approx(first(stride), abs=max(1, stride / 10))
    assert measured == measured_first_centres(make)


def test_centres_of_a_resnet_are_exact_in_its_gradients() -> None:
    """With equal kernels and averages in place of maxima, the gradient of a cell is symmetric."""
    backbone = ResNetBackbone("resnet18").eval()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    backbone.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    images = torch.ones(1, 3, 1024, 32).requires_grad_()
    places: dict[Level, int] = {"res4": 64, "res5": 32}
    for level, cells in places.items():
        value = as_backbone(backbone)(images)[level][0, :, cells // 2].sum()
        (gradient,) = torch.autograd.grad(value, images)
        rows = gradient.double().sum((0, 1, 3))
        centre = float((rows * (torch.arange(1024) + 0.5)).sum() / rows.sum())
        shape = as_backbone(backbone)
        expected = shape.first_centres[level] + cells // 2 * shape.strides[level]
        assert centre == pytest.approx(expected, abs=0.01)
