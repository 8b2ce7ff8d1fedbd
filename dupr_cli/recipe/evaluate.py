"""The recipe of `dupr evaluate`: the detector, its training schedule and how it is tested."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.recipe.base import Backbone, Fraction, Section, Seed, reject

Positive = Annotated[int, Field(ge=1)]


class DetectorSection(Section):
    backbone: Literal["auto"] | Backbone = "auto"
    """`auto` takes the architecture that the weights name (resnet50 when there is only `none`)."""
    norm: Literal["batch", "frozen"] = "batch"
    """Batch norm of the backbone: trained with the detector (MoCo's protocol), or frozen."""
    roi_size: Annotated[int, Field(ge=2, le=28)] = 14
    """Side of the RoIAlign output, in cells, that enters res5."""
    anchor_sizes: list[Positive] = [32, 64, 128, 256, 512]
    """Anchor sides, pixels of the resized image."""
    anchor_ratios: list[Annotated[float, Field(gt=0)]] = [0.5, 1.0, 2.0]
    """Height over width."""
    rpn_batch_per_image: Positive = 256
    """Anchors per image in the loss of the region proposal network."""
    rpn_pre_nms: tuple[Positive, Positive] = (12000, 6000)
    """Proposals kept before non-maximum suppression, in training and in testing."""
    rpn_post_nms: tuple[Positive, Positive] = (2000, 1000)
    """Proposals kept after it, in training and in testing."""
    rois_per_image: Positive = 512
    """Sampled regions per image in the loss of the box head."""
    positive_fraction: Fraction = 0.25
    """Share of positives aimed at among the sampled regions."""


class DetectionDataSection(Section):
    train_sizes: Annotated[list[Positive], Field(min_length=1)] = list(range(480, 801, 32))
    """Short sides, pixels, one drawn for every training batch."""
    test_size: Positive = 800
    """Short side in testing, pixels."""
    max_size: Positive = 1333
    """The long side is at most this, pixels."""
    flip: bool = True
    """Horizontal flip with probability 0.5 in training."""
    train_images: Positive | None = None
    """Train on this many images only, drawn with the seed; all by default."""
    test_images: Positive | None = None
    """Test on the first this many images only; all by default."""


class DetectionTrainSection(Section):
    iterations: Positive = 24_000
    batch_size: Positive = 16
    """Images per iteration."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 100
    """Iterations over which lr rises linearly to its value."""
    milestones: list[Positive] = [18_000, 22_000]
    """Iterations at which lr is multiplied by 0.1."""
    workers: Annotated[int, Field(ge=0)] = 4
    log_every: Positive = 20

    @model_validator(mode="after")
    def _milestones_in_order(self) -> DetectionTrainSection:
        if sorted(set(self.milestones)) != self.milestones:
            reject("milestones", f"{self.milestones}, but iterations must rise, each once")
        if self.milestones and self.milestones[-1] >= self.iterations:
            reject(
                "milestones",
                f"{self.milestones}, but the schedule ends at train.iterations = "
                f"{self.iterations}; give smaller milestones, or [] for a constant lr",
            )
        return self


class DetectionTestSection(Section):
    metric: Literal["voc07", "voc10"] = "voc07"
    """Average precision at 11 recall points (VOC 2007) or as area under the curve (2010 on)."""
    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    detections_per_image: Positive = 100
    precise_bn_batches: Annotated[int, Field(ge=0)] = 200
    """Training batches over which batch-norm statistics are measured anew before testing."""
    pictures: Annotated[int, Field(ge=0)] = 12
    """Test images drawn with detections beside the ground truth."""


class EvaluateRecipe(Section):
    """Faster R-CNN, R-C4 form, fine-tuned on a VOC-like set and tested with VOC's metric."""

    stage: Literal["evaluate"] = "evaluate"
    description: str = ""
    """One line for `dupr recipe list`."""
    protocol: Literal["voc"] = "voc"
    detector: DetectorSection = DetectorSection()
    data: DetectionDataSection = DetectionDataSection()
    train: DetectionTrainSection = DetectionTrainSection()
    test: DetectionTestSection = DetectionTestSection()
    seed: Seed = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> EvaluateRecipe:
        largest = max(*self.data.train_sizes, self.data.test_size)
        if largest > self.data.max_size:
            reject(
                "data.max_size",
                f"{self.data.max_size}, but it bounds the long side and a short side of "
                f"{largest} is asked for; raise it to at least {largest}",
            )
        return self
