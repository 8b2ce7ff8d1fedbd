"""Faster, Mask and Keypoint R-CNN: the heads of their C4 and FPN forms, and the whole network.

C4: res2 to res4 process the image. The backbone's own res5, followed by an extra norm, processes
the regions; the norm is needed because pre-trained res5 features have no particular scale. FPN:
separate heads on a pyramid over res2 to res5.
Source: docs/method.md, "R50-C4, shared" and "COCO"; Lin et al. 2017; He et al. 2017.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dupr_cli.evaluate.detector_data import HeadOutput, Target
from dupr_cli.evaluate.detectors.anchors import Anchors
from dupr_cli.evaluate.detectors.norms import make_norm
from dupr_cli.evaluate.detectors.proposals import make_proposals
from dupr_cli.evaluate.detectors.regions import RegionPooling
from dupr_cli.evaluate.detectors.roi_heads import BoxPredictor, RoIHeads
from dupr_cli.models.backbone import as_backbone
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS
from dupr_cli.recipe.evaluate import EvaluateRecipe

_MASK_CHANNELS = 256
_KEYPOINT_CHANNELS = 512
_FPN_BOX_WIDTH = 1024


class C4Head(nn.Module):
    """Passes regions of res4 through res5 and a norm: vectors by averaging, masks on the map."""

    def __init__(self, backbone: ResNetBackbone, num_classes: int, recipe: EvaluateRecipe) -> None:
        super().__init__()
        detector, channels = recipe.detector, backbone.channels["res5"]
        self.pool = RegionPooling(detector.roi_size, [LEVEL_STRIDES["res4"]])
        # res5 is both a stage and the head: one module, so one set of weights.
        self.res5 = backbone.stage("res5")
        self.norm = make_norm(detector.new_norm)(channels)
        self.mask_head = MaskHead(channels, 0, num_classes) if recipe.has_masks else None
        self.width = channels

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        seen: Tensor = self.norm(self.res5(self.pool(features, boxes)))
        return seen.mean(dim=(2, 3)), seen

    def masks(self, features: Sequence[Tensor], boxes: list[Tensor], seen: Tensor | None) -> Tensor:
        assert self.mask_head is not None
        logits: Tensor = self.mask_head(self(features, boxes)[1] if seen is None else seen)
        return logits


class FPNHead(nn.Module):
    """Processes pyramid regions: two linear layers for boxes, convolutions for masks and keypoints.

    keypoints: of each object, 0 without them.
    """

    def __init__(self, num_classes: int, keypoints: int, recipe: EvaluateRecipe) -> None:
        super().__init__()
        detector, strides = recipe.detector, [LEVEL_STRIDES[level] for level in LEVELS]
        channels = detector.pyramid_channels
        self.pool = RegionPooling(detector.roi_size, strides)
        self.fc1 = nn.Linear(channels * detector.roi_size**2, _FPN_BOX_WIDTH)
        self.fc2 = nn.Linear(_FPN_BOX_WIDTH, _FPN_BOX_WIDTH)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        if recipe.has_masks:
            self.mask_pool = RegionPooling(detector.mask_roi_size, strides)
            self.mask_head = MaskHead(channels, 4, num_classes)
        if keypoints:
            self.keypoint_pool = RegionPooling(detector.keypoint_roi_size, strides)
            self.keypoint_head = KeypointHead(channels, detector.keypoint_convolutions, keypoints)
        self.width = _FPN_BOX_WIDTH

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        vectors = F.relu(self.fc1(self.pool(features, boxes).flatten(1)))
        vectors = F.relu(self.fc2(vectors))
        return vectors, vectors

    def masks(
        self, features: Sequence[Tensor], boxes: list[Tensor], _seen: Tensor | None
    ) -> Tensor:
        logits: Tensor = self.mask_head(self.mask_pool(features, boxes))
        return logits

    def keypoints(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        logits: Tensor = self.keypoint_head(self.keypoint_pool(features, boxes))
        return logits


class KeypointHead(nn.Module):
    """Region maps (n, C, S, S) to heat maps (n, K, 4 S, 4 S), one for each keypoint.

    torchvision's head and predictor are those of the paper. Source: He et al. 2017, section 5;
    detectron2, KRCNNConvDeconvUpsampleHead.
    """

    def __init__(self, channels: int, convolutions: int, keypoints: int) -> None:
        super().__init__()
        self.convolutions = KeypointRCNNHeads(channels, [_KEYPOINT_CHANNELS] * convolutions)
        self.predictor = KeypointRCNNPredictor(_KEYPOINT_CHANNELS, keypoints)

    def forward(self, regions: Tensor) -> Tensor:
        logits: Tensor = self.predictor(self.convolutions(regions))
        return logits.contiguous()  # torchvision's loss takes no channels-last maps


class MaskHead(nn.Module):
    """Region maps (n, C, S, S) to mask logits (n, K, 2 S, 2 S)."""

    def __init__(self, channels: int, convolutions: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, _MASK_CHANNELS, 3, padding=1), nn.ReLU()]
            channels = _MASK_CHANNELS
        self.convolutions = nn.Sequential(*layers)
        self.deconv = nn.ConvTranspose2d(channels, _MASK_CHANNELS, 2, stride=2)
        self.predictor = nn.Conv2d(_MASK_CHANNELS, num_classes, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, regions: Tensor) -> Tensor:
        logits: Tensor = self.predictor(F.relu(self.deconv(self.convolutions(regions))))
        return logits


class TwoStage(nn.Module):
    """Backbone, proposals and heads. `divisible`: sides of a batch are multiples of this."""

    def __init__(
        self, backbone: nn.Module, num_classes: int, recipe: EvaluateRecipe, keypoints: int = 0
    ) -> None:
        """backbone: a `Backbone`; a torchvision ResNet in the C4 form. keypoints: of each object,
        for Keypoint R-CNN."""
        super().__init__()
        detector, shape = recipe.detector, as_backbone(backbone)
        self.backbone = backbone
        self._pyramid = detector.model.endswith("-fpn")
        if self._pyramid:
            norm = None if detector.new_norm == "none" else make_norm(detector.new_norm)
            self.fpn = FeaturePyramidNetwork(
                [shape.channels[level] for level in LEVELS],
                detector.pyramid_channels,
                LastLevelMaxPool(),
                norm,
            )
            strides = [*(LEVEL_STRIDES[level] for level in LEVELS), 64]
            sizes: list[list[float]] = [[size] for size in detector.anchor_sizes]
            head: C4Head | FPNHead = FPNHead(num_classes, keypoints, recipe)
            channels = detector.pyramid_channels
            centres = [shape.first_centres[level] for level in (*LEVELS, "res5")]
        else:
            assert isinstance(backbone, ResNetBackbone)
            strides, sizes = [LEVEL_STRIDES["res4"]], [list(detector.anchor_sizes)]
            head = C4Head(backbone, num_classes, recipe)
            channels, centres = shape.channels["res4"], [shape.first_centres["res4"]]
        self.divisible = 32 if self._pyramid else strides[0]
        anchors = Anchors(sizes, detector.anchor_ratios, strides, detector.anchor_octaves, centres)
        self.rpn = make_proposals(channels, anchors, detector)
        predictor = BoxPredictor(head.width, num_classes)
        self.roi_heads = RoIHeads(
            head, predictor, num_classes, recipe.has_masks, keypoints, detector, recipe.test
        )

    def _features(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        if not self._pyramid:
            return OrderedDict(self.backbone(pixels, ("res4",), "res4"))
        maps = self.backbone(pixels, LEVELS)
        pyramid: OrderedDict[str, Tensor] = self.fpn(OrderedDict((v, maps[v]) for v in LEVELS))
        return pyramid

    def losses(self, images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode."""
        features = self._features(images.tensors)
        proposals, losses = self.rpn(images, features, [{"boxes": t.boxes} for t in targets])
        return {**losses, **self.roi_heads.losses(list(features.values()), proposals, targets)}

    def detect(self, images: ImageList) -> list[HeadOutput]:
        """Detections of a batch; call in evaluation mode."""
        features = self._features(images.tensors)
        proposals, _ = self.rpn(images, features)
        return self.roi_heads.detect(list(features.values()), proposals, images.image_sizes)
