"""RT-DETR v2 and D-FINE: queries become objects, without anchors or non-maximum suppression.

Encoder, decoder, losses and post-processing are those of transformers, built from a configuration
with random weights. The maps of dupr's backbone take the place of transformers' backbone, so that
any network with res3 to res5 fits.
Source: Lv et al., "RT-DETRv2" (arXiv 2407.17140); Peng et al., "D-FINE" (arXiv 2410.13842);
transformers, models/rt_detr_v2, models/d_fine, loss/loss_rt_detr.py and loss/loss_d_fine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from dupr_cli.errors import UsageError
from dupr_cli.evaluate.detector_data import DENSE_LEVELS, HeadOutput, Target
from dupr_cli.evaluate.detectors.norms import replace_batch_norms
from dupr_cli.models.backbone import Backbone
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.evaluate import DetectorSection, EvaluateRecipe
from dupr_cli.runtime.parallel import World

# transformers' losses of a layer and ours. Those of all layers, and of the denoising queries, which
# some batches do not have, are summed.
_NAMES = {
    "loss_vfl": "loss_classifier",
    "loss_bbox": "loss_box_reg",
    "loss_giou": "loss_giou",
    "loss_fgl": "loss_distribution",
    "loss_ddf": "loss_distillation",
}
_MEAN_OVER_QUERIES = "loss_ddf"  # the others are sums, divided by the number of boxes
_PRIOR = 0.01  # initial probability of a class at a query
_D_FINE_POINTS = [3, 6, 3]  # sampled per level and head; RT-DETR v2 has 4 of each


@dataclass(frozen=True)
class _Library:
    """What transformers has for one of the models."""

    config: Callable[..., Any]
    detector: Callable[[Any], Any]
    loss: Callable[..., tuple[Tensor, dict[str, Tensor], object]]
    backbone_config: Callable[..., Any]
    processor: Callable[[], Any]


def library(model: str) -> _Library:
    """transformers' classes for `detector.model`. Raises UsageError when it is not installed."""
    try:
        import transformers
        from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss
    except ImportError as error:
        raise UsageError(
            f"detector.model: {model} needs transformers; `pip install 'dupr-cli[transformers]'`. "
            f"(recipe key: detector.model)"
        ) from error
    if model == "d-fine":
        return _Library(
            transformers.DFineConfig,
            transformers.DFineForObjectDetection,
            DFineForObjectDetectionLoss,
            transformers.RTDetrResNetConfig,
            transformers.RTDetrImageProcessor,
        )
    return _Library(
        transformers.RTDetrV2Config,
        transformers.RTDetrV2ForObjectDetection,
        RTDetrForObjectDetectionLoss,
        transformers.RTDetrResNetConfig,
        transformers.RTDetrImageProcessor,
    )


class _Maps(nn.Module):
    """Takes the place of transformers' backbone: passes on maps that were computed before."""

    def forward(self, _images: Tensor, maps: Sequence[Tensor]) -> list[tuple[Tensor, None]]:
        # transformers gives the padding's mask in place of the maps, and expects one with each map,
        # which neither network looks at.
        return [(values, None) for values in maps]


class QueryHead(nn.Module):
    """Encoder and decoder on res3 to res5: a `DenseHead`.

    Its arithmetic is float32 whatever train.precision says: boxes are refined through the logits of
    their coordinates, of which bfloat16 has 8 bits, or 2 pixels of 640.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, recipe: EvaluateRecipe, world: World
    ) -> None:
        """backbone: only its levels' shapes are looked at.

        Raises UsageError when transformers is not installed.
        """
        super().__init__()
        detector, self._test, self._world = recipe.detector, recipe.test, world
        self.levels, self._strides = DENSE_LEVELS, backbone.strides
        found = library(detector.model)
        self._config = _config(found, num_classes, detector)
        self._loss, self._processor = found.loss, found.processor()
        detector_of_images = found.detector(self._config)
        _start_as_published(detector_of_images)
        self.network = detector_of_images.model
        self.network.backbone = _Maps()
        for projection, level in zip(self.network.encoder_input_proj, self.levels, strict=True):
            projection[0] = nn.Conv2d(backbone.channels[level], detector.query.width, 1, bias=False)
        replace_batch_norms(self, detector.new_norm)

    def losses(self, maps: Mapping[Level, Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of a batch, summed over the layers; call in training mode."""
        height, width = self._image_size(maps)
        device = maps[self.levels[0]].device
        scale = torch.tensor([width, height, width, height], device=device)
        labels = [
            {"class_labels": t.labels, "boxes": box_convert(t.boxes, "xyxy", "cxcywh") / scale}
            for t in targets
        ]
        with torch.autocast(device.type, enabled=False):
            output = self._output(maps, labels)
            _, by_layer, _ = self._loss(
                output.intermediate_logits[:, -1],
                labels,
                device,
                output.intermediate_reference_points[:, -1],
                self._config,
                output.intermediate_logits,
                output.intermediate_reference_points,
                enc_topk_logits=output.enc_topk_logits,
                enc_topk_bboxes=output.enc_topk_bboxes,
                denoising_meta_values=output.denoising_meta_values,
                predicted_corners=output.intermediate_predicted_corners,
                initial_reference_points=output.initial_reference_points,
            )
        # transformers divides by the boxes of this process; the authors, by the mean of all.
        boxes = torch.tensor(float(sum(len(t.labels) for t in targets)), device=device)
        mean = self._world.sum(boxes) / self._world.size
        share = boxes.clamp(min=1) / mean.clamp(min=1)
        sums: dict[str, Tensor] = {}
        for name, value in by_layer.items():
            kind = next(kind for kind in _NAMES if name.startswith(kind))
            weight = share if kind != _MEAN_OVER_QUERIES else 1.0
            sums[_NAMES[kind]] = sums.get(_NAMES[kind], 0) + weight * value
        if self._config.num_denoising and output.denoising_meta_values is None:
            # A batch without objects has no denoising queries. Gradients are averaged over
            # processes, all of which must have the same ones.
            unused = self.network.denoising_class_embed.weight.sum()
            sums["loss_classifier"] = sums["loss_classifier"] + 0 * unused
        return sums

    def detect(
        self, maps: Mapping[Level, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[HeadOutput]:
        """Detections of a batch; call in evaluation mode."""
        with torch.autocast(maps[self.levels[0]].device.type, enabled=False):
            output = self._output(maps, None)
        last = SimpleNamespace(
            logits=output.intermediate_logits[:, -1],
            pred_boxes=output.intermediate_reference_points[:, -1],
        )
        found = self._processor.post_process_object_detection(
            last, self._test.score_threshold, [self._image_size(maps)] * len(sizes)
        )
        best = self._test.detections_per_image
        return [
            HeadOutput(
                clip_boxes_to_image(of["boxes"][:best], size),
                of["labels"][:best],
                of["scores"][:best],
            )
            for of, size in zip(found, sizes, strict=True)
        ]

    def _output(self, maps: Mapping[Level, Tensor], labels: list[dict[str, Tensor]] | None) -> Any:
        given = [maps[level].float() for level in self.levels]
        return self.network(given[0], pixel_mask=given, labels=labels)

    def _image_size(self, maps: Mapping[Level, Tensor]) -> tuple[int, int]:
        """Height and width of the images of a batch, with their padding."""
        level = self.levels[0]
        height, width = (int(side) * self._strides[level] for side in maps[level].shape[2:])
        return height, width


def _start_as_published(detector: Any) -> None:
    """Give a transformers detector the random values from which the authors train.

    transformers starts all layers, and RT-DETR v2's batch norms, at a standard deviation of 0.01,
    as for values that a checkpoint replaces. The authors keep torch's, except for what both set
    on purpose, and begin at the anchors. In a short training on generated scenes, AP was 80
    instead of 23.
    """
    plain = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    # Layers come after what contains them, and special values belong to what contains a layer.
    for module in reversed(list(detector.modules())):
        if isinstance(module, plain):
            module.reset_parameters()
        else:
            detector._init_weights(module)
    network = detector.model
    for head in (network.enc_bbox_head, getattr(network.decoder, "pre_bbox_head", None)):
        if head is not None:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)


def _config(found: _Library, num_classes: int, detector: DetectorSection) -> Any:
    """transformers' configuration; values that are not named are its defaults, the published ones.

    Its backbone, which is replaced, is as small as can be.
    """
    query, levels = detector.query, len(DENSE_LEVELS)
    backbone = found.backbone_config(
        embedding_size=8,
        hidden_sizes=[8] * 4,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    own = {}
    if detector.model == "d-fine":
        own = {"depth_mult": query.depth, "decoder_n_points": _D_FINE_POINTS}
    return found.config(
        num_labels=num_classes,
        backbone_config=backbone,
        d_model=query.width,
        encoder_hidden_dim=query.width,
        decoder_in_channels=[query.width] * levels,
        encoder_ffn_dim=query.feedforward,
        decoder_ffn_dim=query.feedforward,
        hidden_expansion=query.expansion,
        decoder_layers=query.decoder_layers,
        num_queries=query.queries,
        num_denoising=query.denoising,
        initializer_bias_prior_prob=_PRIOR,
        **own,
    )
