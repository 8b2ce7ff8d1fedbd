"""The second stage: sample and classify regions, refine their boxes, predict masks and keypoints.

A `RegionHead` turns regions into vectors, masks and heat maps, which differs between C4 and FPN;
this module holds the rest. Classes are 0 to K - 1, the background is K; each class has its own box
offsets.
Source: Ren et al. 2015, He et al. 2017; detectron2's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypointrcnn_loss
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align

from dupr_cli.evaluate.detector_data import HeadOutput, Target
from dupr_cli.recipe.evaluate import DetectionTestSection, DetectorSection


class RegionHead(Protocol):
    """How an architecture processes regions. Implementations are nn.Modules."""

    def __call__(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors (n, D) for the box predictor, and what `masks` can reuse."""
        ...

    def masks(self, features: Sequence[Tensor], boxes: list[Tensor], seen: Tensor | None) -> Tensor:
        """Mask logits (n, K, M, M). seen: what `__call__` returned for these boxes, if it ran."""
        ...

    def keypoints(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """Logits (n, K, S, S) of the place of each keypoint in its box."""
        ...


class BoxPredictor(nn.Module):
    """Vectors to class scores, the background last, and box offsets of each class."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) to (n, K + 1) and (n, K, 4), float32."""
        offsets: Tensor = self.bbox_pred(vectors)
        return self.cls_score(vectors).float(), torch.unflatten(offsets.float(), 1, (-1, 4))


class RoIHeads(nn.Module):
    """Proposals to losses in training, to detections in evaluation."""

    def __init__(
        self,
        head: nn.Module,
        predictor: BoxPredictor,
        num_classes: int,
        has_masks: bool,
        keypoints: int,
        detector: DetectorSection,
        test: DetectionTestSection,
    ) -> None:
        """head: a RegionHead. keypoints: of each object, 0 without them."""
        super().__init__()
        self.head, self.box_predictor = head, predictor
        self._num_classes, self._has_masks, self._test = num_classes, has_masks, test
        self._keypoints = keypoints
        self._coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self._matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)
        self._sampler = BalancedPositiveNegativeSampler(
            detector.rois_per_image, detector.positive_fraction
        )

    @property
    def _regions(self) -> RegionHead:
        return self.head  # type: ignore[return-value]

    def losses(
        self, features: Sequence[Tensor], proposals: list[Tensor], targets: list[Target]
    ) -> dict[str, Tensor]:
        """Losses over the sampled proposals; objects themselves are among the proposals."""
        sampled = [self._sample(p, t) for p, t in zip(proposals, targets, strict=True)]
        boxes = [of_image.boxes for of_image in sampled]
        labels = torch.cat([of_image.labels for of_image in sampled])
        vectors, seen = self._regions(features, boxes)
        scores, offsets = self.box_predictor(vectors)
        positive = torch.where(labels < self._num_classes)[0]
        wanted = self._coder.encode([of_image.objects for of_image in sampled], boxes)
        of_class = offsets[positive, labels[positive]]
        # The mean is over all sampled regions, so an image with many objects counts no more.
        box_loss = F.l1_loss(of_class, torch.cat(wanted)[positive], reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(scores, labels),
            "loss_box_reg": box_loss / max(1, len(labels)),
        }
        if self._has_masks:
            losses["loss_mask"] = self._mask_loss(features, sampled, targets, seen[positive])
        if self._keypoints:
            losses["loss_keypoint"] = self._keypoint_loss(features, sampled, targets)
        return losses

    def _sample(self, proposals: Tensor, target: Target) -> _Sampled:
        proposals = torch.cat([proposals, target.boxes])
        if len(target.boxes):
            matched = self._matcher(box_iou(target.boxes, proposals))
            nearest = matched.clamp(min=0)
            objects = target.boxes[nearest]
            labels = torch.where(matched >= 0, target.labels[nearest], self._num_classes)
        else:
            nearest = proposals.new_zeros(len(proposals), dtype=torch.long)
            objects = torch.zeros_like(proposals)
            labels = torch.full_like(nearest, self._num_classes)
        is_object = (labels < self._num_classes).long()
        (positive,), (negative,) = self._sampler([is_object])
        chosen = torch.where(positive | negative)[0]
        return _Sampled(proposals[chosen], labels[chosen], objects[chosen], nearest[chosen])

    def _mask_loss(
        self,
        features: Sequence[Tensor],
        sampled: list[_Sampled],
        targets: list[Target],
        seen: Tensor,
    ) -> Tensor:
        positives = [s.only(s.labels < self._num_classes) for s in sampled]
        boxes = [p.boxes for p in positives]
        labels = torch.cat([p.labels for p in positives])
        logits = self._regions.masks(features, boxes, seen).float()
        if not len(labels):
            return logits.sum()
        side = logits.shape[-1]
        wanted = []
        for of_image, target in zip(positives, targets, strict=True):
            assert target.masks is not None
            rois = torch.cat([of_image.nearest[:, None].float(), of_image.boxes], dim=1)
            cut = roi_align(target.masks[:, None].float(), rois, side, aligned=True)
            wanted.append((cut[:, 0] >= 0.5).float())
        of_class = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(of_class, torch.cat(wanted))

    def _keypoint_loss(
        self, features: Sequence[Tensor], sampled: list[_Sampled], targets: list[Target]
    ) -> Tensor:
        """Cross-entropy over the cells of the heat map in which a labelled keypoint lies, the mean
        over the keypoints inside the regions."""
        positives = [s.only(s.labels < self._num_classes) for s in sampled]
        boxes = [p.boxes for p in positives]
        logits = self._regions.keypoints(features, boxes).float()
        wanted = []
        for target in targets:
            assert target.keypoints is not None
            wanted.append(target.keypoints)
        nearest = [p.nearest for p in positives]
        loss: Tensor = keypointrcnn_loss(logits, boxes, wanted, nearest)
        return loss

    def detect(
        self,
        features: Sequence[Tensor],
        proposals: list[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[HeadOutput]:
        """sizes: height and width of each image, without padding."""
        vectors, _ = self._regions(features, proposals)
        scores, offsets = self.box_predictor(vectors)
        counts = [len(of_image) for of_image in proposals]
        boxes = self._coder.decode(offsets.flatten(1), proposals)
        # Without any proposal, the coder omits an axis.
        boxes = boxes.view(len(offsets), -1, 4) if len(offsets) else offsets
        found = [
            select_detections(b, s.softmax(1)[:, :-1], size, self._test)
            for b, s, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True)
        ]
        if self._keypoints:
            return self._with_keypoints(features, found)
        if not self._has_masks:
            return found
        logits = self._regions.masks(features, [f.boxes for f in found], None).float()
        with_masks = []
        for f, of_image in zip(
            found, torch.split(logits, [len(f.boxes) for f in found]), strict=True
        ):
            masks = of_image[torch.arange(len(f.labels), device=f.labels.device), f.labels]
            with_masks.append(HeadOutput(f.boxes, f.labels, f.scores, masks.sigmoid()))
        return with_masks

    def _with_keypoints(
        self, features: Sequence[Tensor], found: list[HeadOutput]
    ) -> list[HeadOutput]:
        boxes = [f.boxes for f in found]
        logits = self._regions.keypoints(features, boxes).float()
        places, scores = keypointrcnn_inference(logits, boxes)
        return [
            HeadOutput(
                f.boxes, f.labels, f.scores,
                # torchvision has a constant visibility in the third column, and the score apart.
                keypoints=torch.cat([place[..., :2], score[..., None]], dim=-1),
            )
            for f, place, score in zip(found, places, scores, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class _Sampled:
    """Regions of one image. labels: K for background. objects: box of the nearest object.

    nearest: its number in the image.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    nearest: Tensor

    def only(self, chosen: Tensor) -> _Sampled:
        return _Sampled(
            self.boxes[chosen], self.labels[chosen], self.objects[chosen], self.nearest[chosen]
        )


def select_detections(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], test: DetectionTestSection
) -> HeadOutput:
    """Boxes (n, K, 4) and scores (n, K) of one image to detections: threshold, NMS, the best ones.

    Non-maximum suppression runs within each class. Values that are not finite are dropped.
    """
    boxes = clip_boxes_to_image(boxes, size)
    usable = scores.isfinite() & boxes.isfinite().all(-1) & (scores > test.score_threshold)
    region, label = torch.where(usable)
    boxes, scores = boxes[region, label], scores[region, label]
    kept = batched_nms(boxes, scores, label, test.nms_iou)[: test.detections_per_image]
    return HeadOutput(boxes[kept], label[kept], scores[kept])
