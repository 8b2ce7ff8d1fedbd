"""RetinaNet: one stage, dense anchors on a pyramid of res3 to res5 and two more levels.

Source: Lin et al. 2017, "Focal loss for dense object detection"; detectron2's defaults (a running
mean of the number of positives divides the losses; smooth L1 with beta 0.1).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from dupr_cli.evaluate.detector_data import DENSE_LEVELS, HeadOutput, Target
from dupr_cli.evaluate.detectors.anchors import Anchors
from dupr_cli.evaluate.detectors.one_stage import DENSE_STRIDES, dense_centres, dense_pyramid
from dupr_cli.evaluate.detectors.roi_heads import select_detections
from dupr_cli.models.backbone import Backbone
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import EvaluateRecipe
from dupr_cli.runtime.parallel import World

_PRIOR = 0.01  # initial probability of an object at an anchor
_SMOOTH_L1_BETA = 0.1
_START_POSITIVES = 100.0  # initial value of the running mean


class RetinaNet(nn.Module):
    """Pyramid and the two subnets that all levels share: a `DenseHead`."""

    positives: Tensor  # running mean of the positive anchors in a device's batch

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        recipe: EvaluateRecipe,
        world: World,
    ) -> None:
        """backbone: only its levels' shapes are looked at."""
        super().__init__()
        detector, self._test, self._world = recipe.detector, recipe.test, world
        self.levels, self._num_classes = DENSE_LEVELS, num_classes
        self._candidates = detector.rpn_pre_nms[1]
        channels = detector.pyramid_channels
        self.fpn = dense_pyramid(backbone, detector, DENSE_STRIDES)
        sizes = [[size] for size in detector.anchor_sizes]
        self.anchors = Anchors(
            sizes,
            detector.anchor_ratios,
            DENSE_STRIDES,
            detector.anchor_octaves,
            dense_centres(backbone, DENSE_STRIDES),
        )
        per_cell = self.anchors.per_cell
        self.cls_subnet, self.bbox_subnet = _subnet(channels), _subnet(channels)
        self.cls_score = nn.Conv2d(channels, per_cell * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, per_cell * 4, 3, padding=1)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, -math.log((1 - _PRIOR) / _PRIOR))
        self._coder, self._matcher = BoxCoder((1.0,) * 4), Matcher(0.5, 0.4, True)
        self.register_buffer("positives", torch.tensor(_START_POSITIVES))

    def _predict(self, maps: Mapping[Level, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level: logits (N, A, K), offsets (N, A, 4) and anchors (A, 4)."""
        pyramid = self.fpn(OrderedDict((level, maps[level]) for level in self.levels))
        found = []
        for level, feature in enumerate(pyramid.values()):
            logits = self.cls_score(self.cls_subnet(feature))
            offsets = self.bbox_pred(self.bbox_subnet(feature))
            anchors = self.anchors.of_level(level, feature)
            found.append((_flat(logits, self._num_classes), _flat(offsets, 4), anchors))
        return found

    def losses(self, maps: Mapping[Level, Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode."""
        levels = self._predict(maps)
        logits = torch.cat([level[0] for level in levels], dim=1)
        offsets = torch.cat([level[1] for level in levels], dim=1)
        anchors = torch.cat([level[2] for level in levels])
        classes, boxes, counts = [], [], []
        for i, target in enumerate(targets):
            matched = self._match(anchors, target)
            positive = matched >= 0
            of_image = logits[i].new_zeros(logits[i].shape)
            of_image[positive, target.labels[matched[positive]]] = 1
            used = matched != Matcher.BETWEEN_THRESHOLDS
            classes.append(
                sigmoid_focal_loss(logits[i][used], of_image[used], 0.25, 2.0, reduction="sum")
            )
            wanted = self._coder.encode_single(target.boxes[matched[positive]], anchors[positive])
            boxes.append(
                F.smooth_l1_loss(
                    offsets[i][positive], wanted, beta=_SMOOTH_L1_BETA, reduction="sum"
                )
            )
            counts.append(positive.sum())
        # The value is the same on every device, so that a continued run restores it too.
        mean = self._world.sum(torch.stack(counts).sum().float()) / self._world.size
        with torch.no_grad():
            self.positives.mul_(0.9).add_(0.1 * mean.clamp(min=1))
        return {
            "loss_classifier": torch.stack(classes).sum() / self.positives.clone(),
            "loss_box_reg": torch.stack(boxes).sum() / self.positives.clone(),
        }

    def _match(self, anchors: Tensor, target: Target) -> Tensor:
        """(A,) number of the object of each anchor; below 0 if it has none."""
        if not len(target.boxes):
            return torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
        matched: Tensor = self._matcher(box_iou(target.boxes, anchors))
        return matched

    def detect(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[HeadOutput]:
        """Detections of a batch; call in evaluation mode."""
        levels = self._predict(maps)
        found = []
        for i, size in enumerate(sizes):
            boxes, scores = [], []
            for logits, offsets, anchors in levels:
                probabilities = logits[i].sigmoid()
                best = probabilities.flatten().topk(min(self._candidates, probabilities.numel()))
                place, label = best.indices // self._num_classes, best.indices % self._num_classes
                decoded = self._coder.decode_single(offsets[i][place], anchors[place])
                # One class each: all others get a score of 0, which is below every threshold.
                one = torch.zeros(len(place), self._num_classes, device=decoded.device)
                scores.append(one.scatter(1, label[:, None], best.values[:, None]))
                boxes.append(decoded[:, None].expand(-1, self._num_classes, -1))
            found.append(select_detections(torch.cat(boxes), torch.cat(scores), size, self._test))
        return found


def _subnet(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(convolution.weight, std=0.01)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


def _flat(maps: Tensor, values: int) -> Tensor:
    """(N, A * values, H, W) to (N, H * W * A, values), float32, in the order of the anchors."""
    n, _, height, width = maps.shape
    cells = maps.view(n, -1, values, height, width).permute(0, 3, 4, 1, 2)
    return cells.reshape(n, -1, values).float()
