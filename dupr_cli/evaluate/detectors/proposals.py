"""The region proposal network: torchvision's, with the protocols' anchors and L1 loss.

torchvision's box loss turns quadratic below 1/9; the protocols' is L1 throughout.
Source: Ren et al. 2015; detectron2's defaults for R50-C4 and R50-FPN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from dupr_cli.evaluate.detectors.anchors import Anchors
from dupr_cli.recipe.evaluate import DetectorSection


class Proposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """Features of all levels to proposals, and in training its two losses."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Losses over all sampled anchors. labels: 1 object, 0 background, -1 neither."""
        positive, negative = self.fg_bg_sampler(labels)
        positives = torch.where(torch.cat(positive))[0]
        sampled = torch.cat([positives, torch.where(torch.cat(negative))[0]])
        targets = torch.cat(labels)[sampled]
        scores = objectness.flatten()[sampled].float()
        offsets = torch.cat(regression_targets)[positives]
        boxes = F.l1_loss(pred_bbox_deltas[positives].float(), offsets, reduction="sum")
        return F.binary_cross_entropy_with_logits(scores, targets), boxes / len(sampled)


def make_proposals(channels: int, anchors: Anchors, recipe: DetectorSection) -> Proposals:
    """channels: of every level."""
    (train_before, test_before), (train_after, test_after) = recipe.rpn_pre_nms, recipe.rpn_post_nms
    head = RPNHead(channels, anchors.per_cell)
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return Proposals(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=recipe.rpn_batch_per_image,
        positive_fraction=0.5,
        pre_nms_top_n={"training": train_before, "testing": test_before},
        post_nms_top_n={"training": train_after, "testing": test_after},
        nms_thresh=0.7,
    )
