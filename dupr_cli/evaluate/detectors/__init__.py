"""The detectors of the transfer protocols, on a ResNet: R-CNN in its C4 and FPN forms, RetinaNet.

They are built from torchvision's detection parts wherever those follow the protocols.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from dupr_cli.artifacts.weights import Weights, load_backbone
from dupr_cli.evaluate.detectors.norms import replace_batch_norms
from dupr_cli.evaluate.detectors.one_stage import OneStage
from dupr_cli.evaluate.detectors.retinanet import RetinaNet
from dupr_cli.evaluate.detectors.roi_heads import HeadOutput, Target
from dupr_cli.evaluate.detectors.two_stage import TwoStage
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.recipe.base import IMAGENET_MEAN, IMAGENET_STD
from dupr_cli.recipe.evaluate import EvaluateRecipe
from dupr_cli.runtime.parallel import World

__all__ = ["Detector", "HeadOutput", "Target", "build_detector"]


class Detector(nn.Module):
    """uint8 images to losses in training, to detections in evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: TwoStage | OneStage,
        mean: Sequence[float],
        std: Sequence[float],
        precision: torch.dtype,
    ) -> None:
        """mean, std: of the input, RGB in 0..1. precision: of the network's arithmetic."""
        super().__init__()
        self.network, self._precision = network, precision
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def backbone(self) -> ResNetBackbone:
        return self.network.backbone

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of a batch; call in training mode.

        images: (3, H, W) uint8 each. targets: labels are class numbers from 0.
        """
        on_device = [
            Target(
                t.boxes.to(self._device),
                t.labels.to(self._device),
                None if t.masks is None else t.masks.to(self._device),
            )
            for t in targets
        ]
        batch = self._normalised(images)
        with self._autocast():
            return self.network.losses(batch, on_device)

    def detect(self, images: list[Tensor]) -> list[HeadOutput]:
        """Detections per image, highest score first; call in evaluation mode.

        images: (3, H, W) uint8 each. Boxes are in pixels of the image, labels from 0.
        """
        batch = self._normalised(images)
        with self._autocast():
            return self.network.detect(batch)

    @property
    def _device(self) -> torch.device:
        return self.mean.device

    def _autocast(self) -> torch.autocast:
        reduced = self._precision != torch.float32
        return torch.autocast(self._device.type, self._precision, enabled=reduced)

    def _normalised(self, images: list[Tensor]) -> ImageList:
        """Images on the device, normalised, padded at the right and bottom to one size.

        The size is a multiple of the coarsest stride, so that cells are exactly a stride apart.
        """
        multiple = self.network.divisible
        height, width = (
            -(-max(image.shape[side] for image in images) // multiple) * multiple for side in (1, 2)
        )
        pixels = torch.zeros(len(images), 3, height, width, device=self._device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for padded, image in zip(pixels, images, strict=True):
            moved = image.to(self._device, non_blocking=True).float().div_(255)
            padded[:, : image.shape[1], : image.shape[2]] = (moved - self.mean) / self.std
        return ImageList(pixels, [(int(i.shape[1]), int(i.shape[2])) for i in images])


def build_detector(
    recipe: EvaluateRecipe,
    architecture: str,
    num_classes: int,
    weights: Weights | None,
    seed: int,
    world: World,
) -> tuple[Detector, int]:
    """A detector ready to train, on the device, and how many tensors it took from the weights.

    All its randomness follows from the seed, not from the weights: compared weights start from
    the same heads. Without weights the backbone stays random.
    Raises UsageError when a tensor of the weights is missing, unknown or of another shape.
    """
    torch.manual_seed(seed)
    backbone = ResNetBackbone(architecture)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    loaded = 0
    if weights is not None:
        loaded = load_backbone(backbone, weights)
        mean, std = weights.metadata.input_mean, weights.metadata.input_std
    replace_batch_norms(backbone, recipe.detector.norm)
    network: TwoStage | OneStage
    if recipe.detector.model == "retinanet-fpn":
        head = RetinaNet(backbone.channels, num_classes, recipe, world)
        network = OneStage(backbone, head)
    else:
        network = TwoStage(backbone, num_classes, recipe)
    precision = getattr(torch, recipe.train.precision)
    detector = Detector(network, mean, std, precision)
    detector.to(memory_format=torch.channels_last)
    return detector.to(world.device), loaded
