"""Dilation of res5: torchvision's own option, and the cells that a network had before."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.dilation import dilate


def shapes(module: nn.Module) -> dict[str, tuple[object, ...]]:
    """Stride, dilation and padding of every convolution."""
    return {
        name: (m.stride, m.dilation, m.padding)
        for name, m in module.named_modules()
        if isinstance(m, nn.Conv2d)
    }


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_dilation_is_torchvisions_own(name: str) -> None:
    ours = make_backbone(name)
    assert dilate(ours)
    oracle = torchvision.models.get_model(
        name, weights=None, replace_stride_with_dilation=[False, False, True]
    )
    assert shapes(ours) == shapes(oracle)


@pytest.mark.parametrize("name", ["resnet18", "timm:test_resnet", "transformers:rt_detr_resnet18"])
def test_cells_keep_their_values_and_new_ones_come_between(name: str) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(name).eval()
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        before = as_backbone(backbone)(images)
        assert dilate(backbone)
        after = as_backbone(backbone)(images)
    assert after["res5"].shape[2:] == (6, 10)
    torch.testing.assert_close(after["res5"][:, :, ::2, ::2], before["res5"], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(after[level], before[level]) for level in ("res2", "res3", "res4"))
    assert as_backbone(backbone).strides["res5"] == 16


def test_tensors_keep_their_names_and_the_first_cell_its_place() -> None:
    backbone, same = make_backbone("resnet18"), make_backbone("resnet18")
    centre = as_backbone(backbone).first_centres["res5"]
    dilate(backbone)
    backbone.load_state_dict(same.state_dict())
    assert as_backbone(backbone).first_centres["res5"] == centre


@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:regnety_002"])
def test_network_that_cannot_be_dilated_stays_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(name).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = as_backbone(backbone)(images)["res5"]
        assert not dilate(backbone)
        assert torch.equal(as_backbone(backbone)(images)["res5"], before)
    assert as_backbone(backbone).strides["res5"] == 32
