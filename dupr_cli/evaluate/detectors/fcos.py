"""FCOS: one stage without anchors, small enough to train on features in a minute.

torchvision's head, assignment, losses and selection; the cells' centres are the backbone's, less
half a pixel.
Source: Tian et al., "FCOS: a simple and strong anchor-free object detector" (arXiv 2006.09214), as
in torchvision (centre sampling, GIoU, norms of 32 groups in the towers).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS, FCOSHead

from dupr_cli.evaluate.detector_data import DENSE_LEVELS, HeadOutput, Target
from dupr_cli.evaluate.detectors.anchors import Anchors
from dupr_cli.evaluate.detectors.one_stage import DENSE_STRIDES, dense_centres, dense_pyramid
from dupr_cli.models.backbone import Backbone
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import EvaluateRecipe

_NAMES = {
    "classification": "loss_classifier",
    "bbox_regression": "loss_box_reg",
    "bbox_ctrness": "loss_centerness",
}


class _NoBackbone(nn.Identity):
    """torchvision's FCOS wants a backbone; here it only sees maps of the pyramid."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class Fcos(nn.Module):
    """Pyramid and FCOS's towers: a `DenseHead`."""

    def __init__(self, backbone: Backbone, num_classes: int, recipe: EvaluateRecipe) -> None:
        """backbone: only its levels' shapes are looked at."""
        super().__init__()
        detector, test = recipe.detector, recipe.test
        self.levels, channels = DENSE_LEVELS, detector.pyramid_channels
        strides = DENSE_STRIDES[: len(detector.anchor_sizes)]
        self.fpn = dense_pyramid(backbone, detector, strides)
        # A cell's "anchor" only carries its centre and the range of objects it answers for.
        self._cells = Anchors(
            [[size] for size in detector.anchor_sizes],
            [1.0],
            strides,
            first_centres=dense_centres(backbone, strides),
        )
        self.fcos = FCOS(
            _NoBackbone(channels),
            num_classes,
            head=FCOSHead(channels, 1, num_classes, detector.head_convolutions),
            score_thresh=test.score_threshold,
            nms_thresh=test.nms_iou,
            detections_per_img=test.detections_per_image,
            topk_candidates=detector.rpn_pre_nms[1],
        )
        # torchvision cuts distances at zero, where there is no gradient, and starts them around it:
        # in some trainings the distance to one side never left zero. FCOS itself starts at exp(0).
        nn.init.ones_(self.fcos.head.regression_head.bbox_reg.bias)

    def _predict(
        self, maps: Mapping[Level, Tensor]
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """The head's output of each level, (N, H * W, values) each, and its cells (H * W, 4)."""
        pyramid = self.fpn(OrderedDict((level, maps[level]) for level in self.levels)).values()
        outputs = [
            {name: values.float() for name, values in self.fcos.head([feature]).items()}
            for feature in pyramid
        ]
        return outputs, [self._cells.of_level(i, feature) for i, feature in enumerate(pyramid)]

    def losses(self, maps: Mapping[Level, Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of a batch, divided by its number of positive cells; call in training mode."""
        outputs, cells = self._predict(maps)
        joined = {name: torch.cat([of[name] for of in outputs], dim=1) for name in outputs[0]}
        wanted = [{"boxes": t.boxes, "labels": t.labels.clone()} for t in targets]
        losses = self.fcos.compute_loss(
            wanted, joined, [torch.cat(cells)] * len(targets), [len(of) for of in cells]
        )
        return {_NAMES[name]: value for name, value in losses.items()}

    def detect(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[HeadOutput]:
        """Detections of a batch; call in evaluation mode."""
        outputs, cells = self._predict(maps)
        by_name = {name: [of[name] for of in outputs] for name in outputs[0]}
        found = self.fcos.postprocess_detections(by_name, [cells] * len(sizes), list(sizes))
        return [HeadOutput(of["boxes"], of["labels"], of["scores"]) for of in found]
