"""The losses of the detectors, written from docs/method.md and the papers, not from our code.

Only torchvision's ResNet, RoIAlign and non-maximum suppression are taken as they are. Where
torchvision's detectors differ from detectron2, whose protocols these are, detectron2's form is
written: anchors are not rounded and lie on the corners of cells; box losses are L1 throughout; the
box loss of the second stage is divided by all sampled regions; masks are cut out with half-pixel
alignment; RetinaNet's normaliser is a running mean. Every anchor and region is sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d, nms, roi_align

LEVELS = ("res2", "res3", "res4", "res5")
BACKGROUND, NEITHER = -1, -2


@dataclass(frozen=True)
class Objects:
    """Of one image. boxes (n, 4), labels (n,), masks (n, H, W)."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


@dataclass(frozen=True)
class Settings:
    classes: int
    anchor_sizes: Sequence[float]
    roi_size: int
    mask_roi_size: int
    before_nms: int
    after_nms: int


def overlaps(objects: Tensor, boxes: Tensor) -> Tensor:
    """(n, m) intersection over union, from the definition."""
    found = torch.zeros(len(objects), len(boxes))
    for i, a in enumerate(objects):
        width = (torch.minimum(a[2], boxes[:, 2]) - torch.maximum(a[0], boxes[:, 0])).clamp(min=0)
        height = (torch.minimum(a[3], boxes[:, 3]) - torch.maximum(a[1], boxes[:, 1])).clamp(min=0)
        inside = width * height
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        found[i] = inside / ((a[2] - a[0]) * (a[3] - a[1]) + areas - inside)
    return found


def matches(objects: Tensor, boxes: Tensor, high: float, low: float, best: bool) -> Tensor:
    """(m,) the object of each box, BACKGROUND, or NEITHER.

    best: the box that an object overlaps most has an object, however little they overlap.
    """
    if not len(objects):
        return torch.full((len(boxes),), BACKGROUND)
    iou = overlaps(objects, boxes)
    value, nearest = iou.max(0)
    found = torch.where(value >= high, nearest, NEITHER)
    found = torch.where(value < low, BACKGROUND, found)
    if best:
        for i in range(len(objects)):
            of_best = iou[i] == iou[i].max()
            found[of_best] = nearest[of_best]
    return found


def offsets(objects: Tensor, boxes: Tensor, weights: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Ren et al. 2015, equation 2, times the weights."""
    sides = [(b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]) for b in (objects, boxes)]
    centres = [
        (b[:, 0] + w / 2, b[:, 1] + h / 2)
        for b, (w, h) in zip((objects, boxes), sides, strict=True)
    ]
    (gw, gh), (bw, bh) = sides
    (gx, gy), (bx, by) = centres
    values = ((gx - bx) / bw, (gy - by) / bh, (gw / bw).log(), (gh / bh).log())
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)], dim=1)


def moved(boxes: Tensor, by: Tensor) -> Tensor:
    """The boxes that offsets stand for; sides grow at most 1000/16 times."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + w / 2 + by[:, 0] * w, boxes[:, 1] + h / 2 + by[:, 1] * h
    most = math.log(1000 / 16)
    w, h = w * by[:, 2].clamp(max=most).exp(), h * by[:, 3].clamp(max=most).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def anchors(height: int, width: int, stride: int, sizes: Sequence[float]) -> Tensor:
    """(H * W * A, 4): at the corner of each cell, every size with heights of 1/2, 1, 2 widths."""
    shapes = []
    for size, ratio in itertools.product(sizes, (0.5, 1.0, 2.0)):
        w = size / math.sqrt(ratio)
        shapes.append((w, w * ratio))
    return torch.tensor(
        [
            [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
            for y in range(height)
            for x in range(width)
            for w, h in shapes
        ]
    )


def by_anchor(maps: Tensor, values: int) -> Tensor:
    """(N, A * values, H, W) to (N, H * W * A, values)."""
    n, channels, height, width = maps.shape
    cells = maps.reshape(n, channels // values, values, height, width)
    return cells.permute(0, 3, 4, 1, 2).reshape(n, -1, values)


class Reference:
    """A detector's state, by the names of its network, and its losses."""

    def __init__(self, state: Mapping[str, Tensor], settings: Settings) -> None:
        self.state, self.settings = state, settings
        network = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
        del network.fc
        own = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
        network.load_state_dict({k: v for k, v in own.items() if "num_batches" not in k})
        self.network = network

    def convolved(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def maps(self, images: Tensor) -> list[Tensor]:
        n = self.network
        x = n.maxpool(n.relu(n.bn1(n.conv1(images))))
        found = []
        for stage in (n.layer1, n.layer2, n.layer3, n.layer4):
            x = stage(x)
            found.append(x)
        return found

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Lin et al. 2017: lateral 1x1, the coarser level added twice as large, 3x3."""
        laterals = [self.convolved(m, f"fpn.inner_blocks.{i}.0") for i, m in enumerate(maps)]
        for i in range(len(laterals) - 2, -1, -1):
            larger = F.interpolate(laterals[i + 1], size=laterals[i].shape[-2:], mode="nearest")
            laterals[i] = laterals[i] + larger
        return [self.convolved(x, f"fpn.layer_blocks.{i}.0") for i, x in enumerate(laterals)]

    def proposals(
        self, features: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[Sequence[float]],
        objects: Sequence[Objects], shapes: Sequence[tuple[int, int]],
    ) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
        """Proposals of each image, and the losses of the region proposal network."""
        scores, deltas, boxes = [], [], []
        for feature, stride, of_level in zip(features, strides, sizes, strict=True):
            hidden = self.convolved(feature, "rpn.head.conv.0.0").relu()
            scores.append(by_anchor(self.convolved(hidden, "rpn.head.cls_logits"), 1)[..., 0])
            deltas.append(by_anchor(self.convolved(hidden, "rpn.head.bbox_pred"), 4))
            boxes.append(anchors(feature.shape[2], feature.shape[3], stride, of_level))
        every = torch.cat(boxes)
        classify, regress, sampled = [], [], 0
        found = []
        for n, of_image in enumerate(objects):
            match = matches(of_image.boxes, every, 0.7, 0.3, best=True)
            logits = torch.cat([s[n] for s in scores])
            by = torch.cat([d[n] for d in deltas])
            used, positive = match != NEITHER, match >= 0
            classify.append(
                F.binary_cross_entropy_with_logits(
                    logits[used], positive[used].float(), reduction="sum"
                )
            )
            wanted = offsets(of_image.boxes[match[positive]], every[positive])
            regress.append((by[positive] - wanted).abs().sum())
            sampled += int(used.sum())
            found.append(self.best(n, scores, deltas, boxes, shapes[n]))
        return found, {
            "loss_objectness": torch.stack(classify).sum() / sampled,
            "loss_rpn_box_reg": torch.stack(regress).sum() / sampled,
        }

    def best(
        self, n: int, scores: Sequence[Tensor], deltas: Sequence[Tensor],
        boxes: Sequence[Tensor], shape: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """The proposals of one image: the best of each level, without those that overlap."""
        height, width = shape
        values, places = [], []
        for s, d, anchor in zip(scores, deltas, boxes, strict=True):
            top = s[n].detach().topk(min(self.settings.before_nms, len(s[n])))
            found = moved(anchor[top.indices], d[n].detach()[top.indices])
            found[:, 0::2] = found[:, 0::2].clamp(0, width)
            found[:, 1::2] = found[:, 1::2].clamp(0, height)
            large = ((found[:, 2:] - found[:, :2]) >= 1e-3).all(1)
            found, value = found[large], top.values[large]
            chosen = nms(found, value, 0.7)
            values.append(value[chosen])
            places.append(found[chosen])
        order = torch.cat(values).argsort(descending=True)[: self.settings.after_nms]
        return torch.cat(places)[order]

    def pooled(
        self, features: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int
    ) -> Tensor:
        """Each region from the level of its size: 224 x 224 from stride 16 (Lin et al.)."""
        rows = []
        for n, of_image in enumerate(boxes):
            for box in of_image:
                level = 0
                if len(strides) > 1:
                    root = float((box[2] - box[0]).clamp(min=0) * (box[3] - box[1]).clamp(min=0))
                    exact = 2 + math.floor(math.log2(math.sqrt(root) / 224 + 1e-8))
                    level = min(max(exact, 0), len(strides) - 1)
                rows.append(
                    roi_align(
                        features[level][n : n + 1], [box[None]], side, 1 / strides[level],
                        aligned=True,
                    )
                )  # fmt: skip
        return torch.cat(rows)

    def second_stage(
        self, features: Sequence[Tensor], strides: Sequence[int], proposals: Sequence[Tensor],
        objects: Sequence[Objects], pyramid: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses of classes, boxes and masks; objects themselves are among the regions."""
        s = self.settings
        regions = [torch.cat([p, o.boxes]) for p, o in zip(proposals, objects, strict=True)]
        found = [
            matches(o.boxes, r, 0.5, 0.5, best=False) for o, r in zip(objects, regions, strict=True)
        ]
        pooled = self.pooled(features, strides, regions, s.roi_size)
        if pyramid:
            hidden = self.linear(pooled.flatten(1), "roi_heads.head.fc1").relu()
            vectors = maps = self.linear(hidden, "roi_heads.head.fc2").relu()
        else:
            name = "roi_heads.head.norm"
            maps = F.group_norm(
                self.network.layer4(pooled), 32,
                self.state[f"{name}.weight"], self.state[f"{name}.bias"],
            )  # fmt: skip
            vectors = maps.mean((2, 3))
        scores = self.linear(vectors, "roi_heads.box_predictor.cls_score")
        deltas = self.linear(vectors, "roi_heads.box_predictor.bbox_pred")
        classify, regress, masks, row = [], [], [], 0
        positives: list[tuple[int, int, Tensor, int]] = []
        for n, (of_image, region, match) in enumerate(zip(objects, regions, found, strict=True)):
            for box, place in zip(region, match.tolist(), strict=True):
                label = int(of_image.labels[place]) if place >= 0 else s.classes
                classify.append(-scores[row].log_softmax(0)[label])
                if place >= 0:
                    wanted = offsets(of_image.boxes[place][None], box[None], (10, 10, 5, 5))[0]
                    regress.append((deltas[row, 4 * label : 4 * label + 4] - wanted).abs().sum())
                    positives.append((row, n, box, place))
                row += 1
        losses = {
            "loss_classifier": torch.stack(classify).mean(),
            "loss_box_reg": torch.stack(regress).sum() / row,
        }
        if objects[0].masks is None:
            return losses
        for place_of, n, box, place in positives:
            of_image = objects[n]
            assert of_image.masks is not None
            if pyramid:
                x = self.pooled(features, strides, [
                    box[None] if i == n else box.new_zeros(0, 4) for i in range(len(objects))
                ], s.mask_roi_size)  # fmt: skip
                for i in range(4):
                    x = self.convolved(x, f"roi_heads.head.mask_head.convolutions.{2 * i}").relu()
            else:
                x = maps[place_of : place_of + 1]
            name = "roi_heads.head.mask_head."
            x = F.conv_transpose2d(
                x, self.state[f"{name}deconv.weight"], self.state[f"{name}deconv.bias"], stride=2
            ).relu()
            logits = self.convolved(x, f"{name}predictor")[0, of_image.labels[place]]
            mask = of_image.masks[place][None, None].float()
            wanted = roi_align(mask, [box[None]], logits.shape[-1], aligned=True)[0, 0] >= 0.5
            masks.append(F.binary_cross_entropy_with_logits(logits, wanted.float()))
        return losses | {"loss_mask": torch.stack(masks).mean()}

    def two_stage(
        self, images: Tensor, objects: Sequence[Objects], shapes: Sequence[tuple[int, int]],
        pyramid: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        maps, sizes = self.maps(images), self.settings.anchor_sizes
        if pyramid:
            features = self.pyramid(maps)
            coarse = F.max_pool2d(features[-1], 1, 2)
            found, losses = self.proposals(
                [*features, coarse], (4, 8, 16, 32, 64), [[v] for v in sizes], objects, shapes
            )
            return losses | self.second_stage(features, (4, 8, 16, 32), found, objects, True)
        found, losses = self.proposals([maps[2]], (16,), [sizes], objects, shapes)
        return losses | self.second_stage([maps[2]], (16,), found, objects, False)

    def retinanet(self, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        """Lin et al. 2017, "Focal loss": alpha 0.25, gamma 2; detectron2's smooth L1, beta 0.1."""
        maps = self.maps(images)
        features = self.pyramid(maps[1:])
        features.append(self.convolved(maps[3], "fpn.extra_blocks.p6", 2))
        features.append(self.convolved(features[-1].relu(), "fpn.extra_blocks.p7", 2))
        logits, deltas, boxes = [], [], []
        for feature, stride, size in zip(
            features, (8, 16, 32, 64, 128), self.settings.anchor_sizes, strict=True
        ):
            kinds = []
            for subnet, last, values in (
                ("cls_subnet", "cls_score", self.settings.classes), ("bbox_subnet", "bbox_pred", 4)
            ):  # fmt: skip
                x = feature
                for i in range(4):
                    x = self.convolved(x, f"{subnet}.{2 * i}").relu()
                kinds.append(by_anchor(self.convolved(x, last), values))
            logits.append(kinds[0])
            deltas.append(kinds[1])
            octaves = [size * 2 ** (k / 3) for k in range(3)]
            boxes.append(anchors(feature.shape[2], feature.shape[3], stride, octaves))
        every, focal, smooth, positives = torch.cat(boxes), [], [], 0
        for n, of_image in enumerate(objects):
            match = matches(of_image.boxes, every, 0.5, 0.4, best=True)
            scores, by = torch.cat([v[n] for v in logits]), torch.cat([v[n] for v in deltas])
            positive = match >= 0
            wanted = torch.zeros_like(scores)
            wanted[positive, of_image.labels[match[positive]]] = 1
            p = scores.sigmoid()
            right = torch.where(wanted == 1, p, 1 - p)
            alpha = torch.where(wanted == 1, 0.25, 0.75)
            loss = -alpha * (1 - right) ** 2 * right.log()
            focal.append(loss[match != NEITHER].sum())
            apart = (by[positive] - offsets(of_image.boxes[match[positive]], every[positive])).abs()
            smooth.append(torch.where(apart < 0.1, apart**2 / 0.2, apart - 0.05).sum())
            positives += int(positive.sum())
        mean = 0.9 * 100 + 0.1 * max(1, positives)
        return {
            "loss_classifier": torch.stack(focal).sum() / mean,
            "loss_box_reg": torch.stack(smooth).sum() / mean,
        }
