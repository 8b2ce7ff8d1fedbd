"""The networks of the transfer protocols: R-CNN in its C4 and FPN forms, RetinaNet, FCOS, RT-DETR
v2, D-FINE, and the FCN of semantic segmentation.

Detectors are built from torchvision's detection parts wherever those follow the protocols, and
RT-DETR v2 and D-FINE from transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from dupr_cli.artifacts.pixel_formats import NetworkInput
from dupr_cli.artifacts.weights import Weights
from dupr_cli.evaluate.detector_data import AnyOutput, AnyTarget, HeadOutput, ImageMaps, Target
from dupr_cli.evaluate.detectors.detr import QueryHead
from dupr_cli.evaluate.detectors.fcn import Fcn
from dupr_cli.evaluate.detectors.fcos import Fcos
from dupr_cli.evaluate.detectors.norms import replace_batch_norms
from dupr_cli.evaluate.detectors.one_stage import DenseHead, OneStage
from dupr_cli.evaluate.detectors.retinanet import RetinaNet
from dupr_cli.evaluate.detectors.two_stage import TwoStage
from dupr_cli.models.backbone import (
    Backbone,
    as_backbone,
    load_backbone,
    make_backbone,
)
from dupr_cli.models.dilation import dilate
from dupr_cli.models.frozen import FrozenBackbone, normalised_batch
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import DENSE_MODELS, QUERY_MODELS, EvaluateRecipe
from dupr_cli.runtime.parallel import World

__all__ = [
    "Detector",
    "FrozenDetector",
    "HeadOutput",
    "Target",
    "build_detector",
    "dense_head",
]


class FrozenDetector(nn.Module):
    """The part of a detector that is trained on features of a frozen backbone: its dense head."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, head: nn.Module, frozen: FrozenBackbone, architecture: str, precision: torch.dtype
    ) -> None:
        """frozen: what computed the features. precision: of the head's arithmetic."""
        super().__init__()
        self.head, self.architecture, self._precision = head, architecture, precision
        self.register_buffer("mean", frozen.mean.view(-1, 1, 1).clone(), persistent=False)
        self.register_buffer("std", frozen.std.view(-1, 1, 1).clone(), persistent=False)

    def losses(self, images: list[ImageMaps], targets: Sequence[AnyTarget]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode. targets: labels are class numbers from 0."""
        on_device = [t.to(self.mean.device) for t in targets]
        with _autocast(self.mean.device, self._precision):
            return cast(DenseHead, self.head).losses(self._batch(images), on_device)

    def detect(self, images: list[ImageMaps]) -> Sequence[AnyOutput]:
        """Detections per image, highest score first, in pixels of the resized image; call in
        evaluation mode."""
        with _autocast(self.mean.device, self._precision):
            sizes = [image.size for image in images]
            return cast(DenseHead, self.head).detect(self._batch(images), sizes)

    def _batch(self, images: list[ImageMaps]) -> dict[Level, Tensor]:
        """Maps of each level (N, C, H, W) float32, padded with zeros at the right and bottom."""
        batch: dict[Level, Tensor] = {}
        for level in images[0].maps:
            maps = [image.maps[level] for image in images]
            height, width = (max(m.shape[side] for m in maps) for side in (1, 2))
            joined = torch.zeros(len(maps), len(maps[0]), height, width)
            for place, values in zip(joined, maps, strict=True):
                place[:, : values.shape[1], : values.shape[2]] = values
            moved = joined.to(self.mean.device, non_blocking=True)
            batch[level] = moved.contiguous(memory_format=torch.channels_last)
        return batch


class Detector(nn.Module):
    """Images to losses in training, to detections in evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: TwoStage | OneStage,
        mean: Sequence[float],
        std: Sequence[float],
        precision: torch.dtype,
        least_side: int = 0,
    ) -> None:
        """mean, std: of the input's channels, in 0..1. precision: of the network's arithmetic.
        least_side: smaller training batches are padded to it."""
        super().__init__()
        self.network, self._precision, self._least_side = network, precision, least_side
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def backbone(self) -> nn.Module:
        return self.network.backbone

    @property
    def architecture(self) -> str:
        return as_backbone(self.backbone).architecture

    def losses(self, images: list[Tensor], targets: Sequence[AnyTarget]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode.

        images: (C, H, W) each, see `ImageBatch`. targets: labels are class numbers from 0.
        """
        on_device = [t.to(self._device) for t in targets]
        batch = self.normalised(images)
        # A network gets the targets of its own task.
        with _autocast(self._device, self._precision):
            losses: dict[str, Tensor] = cast(Any, self.network).losses(batch, on_device)
            return losses

    def detect(self, images: list[Tensor]) -> Sequence[AnyOutput]:
        """Detections per image, highest score first; call in evaluation mode.

        images: (C, H, W) each, see `ImageBatch`. Boxes are in pixels of the image, labels from
        0.
        """
        batch = self.normalised(images)
        with _autocast(self._device, self._precision):
            return self.network.detect(batch)

    @property
    def _device(self) -> torch.device:
        return self.mean.device

    def normalised(self, images: list[Tensor]) -> ImageList:
        """Images on the device, normalised and padded; see `normalised_batch`."""
        least = self._least_side if self.training else 0
        pixels = normalised_batch(images, self.mean, self.std, self.network.divisible, least)
        return ImageList(pixels, [(int(i.shape[1]), int(i.shape[2])) for i in images])


def _autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def dense_head(
    backbone: Backbone, num_classes: int, recipe: EvaluateRecipe, world: World
) -> nn.Module:
    """The recipe's `DenseHead`. backbone: only its levels' shapes are looked at."""
    if recipe.is_semantic:
        return Fcn(backbone, num_classes, recipe, world)
    if recipe.detector.model in QUERY_MODELS:
        return QueryHead(backbone, num_classes, recipe, world)
    if recipe.detector.model == "fcos-fpn":
        return Fcos(backbone, num_classes, recipe)
    return RetinaNet(backbone, num_classes, recipe, world)


def build_frozen_detector(
    recipe: EvaluateRecipe,
    frozen: FrozenBackbone,
    num_classes: int,
    seed: int,
    world: World,
) -> FrozenDetector:
    """A head ready to train on stored features, on the device; its randomness follows from the
    seed."""
    torch.manual_seed(seed)
    head = dense_head(frozen.shape, num_classes, recipe, world)
    precision = getattr(torch, recipe.train.precision)
    detector = FrozenDetector(head, frozen, frozen.shape.architecture, precision)
    detector.to(memory_format=torch.channels_last)
    return detector.to(world.device)


def build_detector(
    recipe: EvaluateRecipe,
    architecture: str,
    num_classes: int,
    weights: Weights | None,
    seed: int,
    world: World,
    taken: NetworkInput | None = None,
    keypoints: int = 0,
) -> tuple[Detector, int]:
    """A detector ready to train, on the device, and how many tensors it took from the weights.

    All its randomness follows from the seed, not from the weights: compared weights start from
    the same heads. Without weights the backbone stays random. taken: the network's input; by
    default that of the weights, or RGB with ImageNet's statistics. keypoints: of each object.
    Raises UsageError when a tensor of the weights is missing, unknown or of another shape.
    """
    torch.manual_seed(seed)
    taken = taken or (weights.metadata.input if weights is not None else NetworkInput())
    backbone = make_backbone(architecture, taken.channels)
    loaded = 0 if weights is None else load_backbone(backbone, weights)
    if recipe.dilates:
        dilate(backbone)
    replace_batch_norms(backbone, recipe.detector.norm)
    network: TwoStage | OneStage
    if recipe.detector.model in DENSE_MODELS or recipe.is_semantic:
        network = OneStage(backbone, dense_head(as_backbone(backbone), num_classes, recipe, world))
    else:
        network = TwoStage(backbone, num_classes, recipe, keypoints)
    precision = getattr(torch, recipe.train.precision)
    least_side = recipe.semantic.crop if recipe.is_semantic else 0
    detector = Detector(network, taken.mean, taken.std, precision, least_side)
    detector.to(memory_format=torch.channels_last)
    return detector.to(world.device), loaded
