"""Faster R-CNN in the C4 form on a ResNet: res2..res4 see the image, res5 sees its regions.

The backbone's own res5 is the box head, followed by an extra batch norm and global average pooling:
pre-trained res5 features come in no particular scale. Built from torchvision's detection parts.

Source: docs/method.md, "R50-C4, shared" (MoCo's transfer protocol in detectron2). torchvision's
smooth L1 losses turn quadratic below 1/9, detectron2's are plain L1 there; the rest is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FrozenBatchNorm2d, roi_align

from dupr_cli.artifacts.weights import Weights, load_backbone
from dupr_cli.backbones import ResNetBackbone
from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD, LEVEL_STRIDES, Level
from dupr_cli.recipe.evaluate import DetectorSection, EvaluateRecipe

_LEVEL: Level = "res4"
_STRIDE = LEVEL_STRIDES[_LEVEL]


class RegionPooling(nn.Module):
    """RoIAlign of the one feature map, half-pixel exact.

    torchvision's MultiScaleRoIAlign has aligned=False, which shifts regions by half a cell; the
    protocol's ROIAlignV2 does not.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], _sizes: list[tuple[int, int]]
    ) -> Tensor:
        """boxes: per image (n, 4) in pixels. Returns (all n, C, size, size)."""
        pooled: Tensor = roi_align(
            features[_LEVEL], boxes, self.size, spatial_scale=1 / _STRIDE, aligned=True
        )
        return pooled.contiguous(memory_format=torch.channels_last)


class Res5Head(nn.Module):
    """Regions (n, C4, S, S) through res5, a norm of its own and average pooling to (n, C5)."""

    def __init__(self, res5: nn.Module, channels: int) -> None:
        super().__init__()
        self.res5 = res5
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, regions: Tensor) -> Tensor:
        features: Tensor = self.norm(self.res5(regions))
        return features.mean(dim=(2, 3))


class Detector(nn.Module):
    """The network as a whole: losses in training, detections in evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: ResNetBackbone,
        recipe: EvaluateRecipe,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """num_classes: without background. mean, std: of the input, RGB in 0..1."""
        super().__init__()
        detector = recipe.detector
        self.backbone = backbone
        self.rpn = _region_proposals(backbone.channels[_LEVEL], detector)
        # res5 is in the network twice, as a stage and as the head: one module, one set of weights.
        self.roi_heads = RoIHeads(
            RegionPooling(detector.roi_size),
            Res5Head(backbone.stage("res5"), backbone.channels["res5"]),
            _predictor(backbone.channels["res5"], num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=detector.rois_per_image,
            positive_fraction=detector.positive_fraction,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=recipe.test.score_threshold,
            nms_thresh=recipe.test.nms_iou,
            detections_per_img=recipe.test.detections_per_image,
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def losses(
        self, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> dict[str, Tensor]:
        """Four losses of a batch; call in training mode.

        images: (3, H, W) uint8 each. boxes: (n, 4) pixels. labels: (n,) class numbers from 0.
        """
        targets = [
            # torchvision keeps class 0 for the background.
            {"boxes": b.to(self._device), "labels": label.to(self._device) + 1}
            for b, label in zip(boxes, labels, strict=True)
        ]
        batch, features = self._features(images)
        proposals, losses = self.rpn(batch, features, targets)
        _, head_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**losses, **head_losses}

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections per image, highest score first; call in evaluation mode.

        images: (3, H, W) uint8 each. Returns boxes (d, 4) in pixels, labels (d,) from 0, scores.
        """
        batch, features = self._features(images)
        proposals, _ = self.rpn(batch, features)
        detections, _ = self.roi_heads(features, proposals, batch.image_sizes)
        return [{**found, "labels": found["labels"] - 1} for found in detections]

    @property
    def _device(self) -> torch.device:
        return self.mean.device

    def _features(self, images: list[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        batch = self._normalised(images)
        return batch, dict(self.backbone(batch.tensors, (_LEVEL,), _LEVEL))

    def _normalised(self, images: list[Tensor]) -> ImageList:
        """Images on the device, normalised, padded at the right and bottom to one size.

        The size is a multiple of the stride: anchors are then exactly that far apart.
        """
        height, width = (
            -(-max(image.shape[side] for image in images) // _STRIDE) * _STRIDE for side in (1, 2)
        )
        pixels = torch.zeros(len(images), 3, height, width, device=self._device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for padded, image in zip(pixels, images, strict=True):
            moved = image.to(self._device, non_blocking=True).float().div_(255)
            padded[:, : image.shape[1], : image.shape[2]] = (moved - self.mean) / self.std
        return ImageList(pixels, [(int(i.shape[1]), int(i.shape[2])) for i in images])


def _region_proposals(channels: int, recipe: DetectorSection) -> RegionProposalNetwork:
    anchors = AnchorGenerator((tuple(recipe.anchor_sizes),), (tuple(recipe.anchor_ratios),))
    (train_before, test_before), (train_after, test_after) = recipe.rpn_pre_nms, recipe.rpn_post_nms
    return RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=recipe.rpn_batch_per_image,
        positive_fraction=0.5,
        pre_nms_top_n={"training": train_before, "testing": test_before},
        post_nms_top_n={"training": train_after, "testing": test_after},
        nms_thresh=0.7,
    )


def _predictor(channels: int, num_classes: int) -> FastRCNNPredictor:
    """Class scores and class-specific boxes, initialised as in detectron2."""
    predictor = FastRCNNPredictor(channels, num_classes + 1)
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(predictor.cls_score.bias)
    nn.init.zeros_(predictor.bbox_pred.bias)
    return predictor


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d in `module` by a constant scale and shift from its statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            state = child.state_dict()
            del state["num_batches_tracked"]
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)


def build_detector(
    recipe: EvaluateRecipe, architecture: str, num_classes: int, weights: Weights | None
) -> Detector:
    """A detector ready to train, on the CPU; without weights its backbone stays random.

    Everything random in it follows from the recipe's seed, whatever the weights: compared weights
    start from the same heads. The backbone's norms are frozen, or all trained, as the recipe says;
    the norm after res5 is new and always trained.
    Raises UsageError when a tensor of the weights is missing, unknown or of another shape.
    """
    torch.manual_seed(recipe.seed)
    backbone = ResNetBackbone(architecture)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    if weights is not None:
        load_backbone(backbone, weights)
        mean, std = weights.metadata.input_mean, weights.metadata.input_std
    if recipe.detector.norm == "frozen":
        freeze_batch_norms(backbone)
    return Detector(backbone, recipe, num_classes, mean, std).to(memory_format=torch.channels_last)
