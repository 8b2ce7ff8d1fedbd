"""The recipe of a transfer protocol: the network on the backbone, its training and its test."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.recipe.base import (
    LEVEL_STRIDES,
    BackboneOrAuto,
    Fraction,
    ImageSide,
    Level,
    Section,
    Seed,
    expects,
    reject,
)
from dupr_cli.recipe.semantic import SemanticSection

Positive = Annotated[int, Field(ge=1)]
Model = Literal[
    "faster-rcnn-c4",
    "mask-rcnn-c4",
    "faster-rcnn-fpn",
    "mask-rcnn-fpn",
    "keypoint-rcnn-fpn",
    "retinanet-fpn",
    "fcos-fpn",
    "rtdetr-v2",
    "d-fine",
    "fcn",
]
LabelList = Annotated[
    list[Positive | Annotated[str, Field(pattern=r"^(all|\d+(\.\d+)?%)$")]], Field(min_length=2)
]
QUERY_MODELS = ("rtdetr-v2", "d-fine")
DENSE_MODELS = ("retinanet-fpn", "fcos-fpn", *QUERY_MODELS)
Labels = Annotated[str, Field(pattern=r"^(all|\d+(\.\d+)?%|.+\.json)$")]


class QuerySection(Section):
    """Encoder and decoder of RT-DETR v2 and D-FINE. Defaults: those of RT-DETR v2's R50."""

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 256
    """Channels of encoder, decoder and queries, for 8 attention heads."""
    feedforward: Positive = 1024
    """Width of the layers between attentions."""
    expansion: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Width of the encoder's convolutional blocks, as a factor of `width`."""
    depth: Annotated[float, Field(gt=0, le=1)] = 1.0
    """D-FINE: factor of the 3 layers in each convolutional block of the encoder."""
    decoder_layers: Annotated[int, Field(ge=2)] = 6
    queries: Positive = 300
    """Detections are chosen from the outputs of this many queries. They start from the most
    promising cells of res3 to res5."""
    denoising: Annotated[int, Field(ge=0)] = 100
    """Number of additional queries in training that start from labelled boxes with noise."""


class DetectorSection(Section):
    model: Model = "faster-rcnn-c4"
    """C4: res5 is the box head, on regions of res4. FPN: heads on a feature pyramid of res2 to res5
    (RetinaNet and FCOS: from res3). Mask R-CNN needs labels with masks, Keypoint R-CNN such with
    keypoints, and it is trained on the classes that have them. RT-DETR v2 and D-FINE: a
    transformer on res3 to res5, whose queries become objects; they need transformers. fcn: semantic
    segmentation with a few convolutions on res5; it needs labels with a class for every pixel."""
    backbone: BackboneOrAuto = "auto"
    """`auto` takes the architecture that the weights name (resnet50 if only `none` is given);
    otherwise as model.backbone of `dupr pretrain`."""
    frozen: Level | None = None
    """The backbone up to this level keeps the given weights, with batch-norm statistics that are
    measured once on the labelled training images; later levels are fine-tuned. res5: all of it is
    frozen, so its features are computed once per image and shared by seeds and numbers of labels
    (retinanet-fpn, fcos-fpn, rtdetr-v2, d-fine and fcn)."""
    norm: Literal["sync", "batch", "frozen"] = "sync"
    """Batch norm of the backbone: trained with statistics of the whole batch over all devices
    (sync) or of each device's part (batch), or frozen."""
    new_norm: Literal["sync", "batch", "group", "none"] = "sync"
    """Norm of new layers: after res5 in C4, after the convolutions of the pyramid in FPN, in the
    encoder of RT-DETR and D-FINE (sync or batch), after the head's convolutions in an FCN. group:
    32 groups, independent of the batch."""
    roi_size: Annotated[int, Field(ge=2, le=28)] = 14
    """Side of the RoIAlign output that enters the box head, in cells (14 in C4, 7 in FPN)."""
    mask_roi_size: Annotated[int, Field(ge=2, le=28)] = 14
    """Side of the RoIAlign output for the mask head of FPN; masks have twice this side."""
    keypoint_roi_size: Annotated[int, Field(ge=2, le=28)] = 14
    """Side of the RoIAlign output for the keypoint head; its heat maps have four times this
    side."""
    keypoint_convolutions: Positive = 8
    """Convolutions of 512 channels before the heat maps of keypoints."""
    anchor_sizes: Annotated[list[Positive], Field(min_length=1)] = [32, 64, 128, 256, 512]
    """Anchor sides, pixels of the resized image. FPN: one per level of the pyramid. FCOS: of 3 or 5
    levels; a level answers for objects that reach 4 to 8 times its size from a cell, the first
    and the last also for smaller and larger ones."""
    anchor_ratios: list[Annotated[float, Field(gt=0)]] = [0.5, 1.0, 2.0]
    """Height over width of the anchors."""
    anchor_octaves: Positive = 1
    """Number n of anchors per size, scaled by 2^(k/n) (3 in RetinaNet)."""
    pyramid_channels: Positive = 256
    head_convolutions: Positive = 4
    """Convolutions before the predictions of FCOS, for classes and for boxes."""
    rpn_batch_per_image: Positive = 256
    """Anchors per image in the loss of the region proposal network."""
    rpn_pre_nms: tuple[Positive, Positive] = (12000, 6000)
    """Proposals kept before non-maximum suppression, in training and in testing (FPN: per level).
    RetinaNet, FCOS: the second is the number of candidates per level decoded in testing."""
    rpn_post_nms: tuple[Positive, Positive] = (2000, 1000)
    """Proposals kept after non-maximum suppression, in training and in testing."""
    rois_per_image: Positive = 512
    """Sampled regions per image in the loss of the box head."""
    positive_fraction: Fraction = 0.25
    """Target share of positives among the sampled regions."""
    query: QuerySection = QuerySection()
    """Only for rtdetr-v2 and d-fine."""

    @model_validator(mode="after")
    def _pyramid_has_its_sizes(self) -> DetectorSection:
        if self.model == "fcos-fpn":
            if len(self.anchor_sizes) not in (3, 5):
                reject(
                    "anchor_sizes",
                    f"{self.anchor_sizes}, but the pyramid of fcos-fpn has 3 levels, p3 to p5, or "
                    f"5, p3 to p7; give one for each, such as [8, 16, 32]",
                )
            if self.pyramid_channels % 32:
                reject(
                    "pyramid_channels",
                    f"{self.pyramid_channels}, but fcos-fpn has norms of 32 groups; give a "
                    f"multiple of 32",
                )
        elif self.model.endswith("-fpn") and len(self.anchor_sizes) != 5:
            reject(
                "anchor_sizes",
                f"{self.anchor_sizes}, but the pyramid of {self.model} has 5 levels, "
                f"{'p3 to p7' if self.model == 'retinanet-fpn' else 'p2 to p6'}; give one for each",
            )
        return self

    @model_validator(mode="after")
    def _queries_fit(self) -> DetectorSection:
        if self.model not in QUERY_MODELS:
            if self.query != QuerySection():
                reject(
                    "query",
                    f"set, but {self.model} has no queries; remove it, or give detector.model = "
                    f"{' or '.join(QUERY_MODELS)}",
                )
        elif self.new_norm not in ("sync", "batch"):
            reject(
                "new_norm",
                f"{self.new_norm}, but the encoder of {self.model} has batch norms; give sync or "
                f"batch",
            )
        elif self.model != "d-fine" and self.query.depth != 1:
            reject(
                "query.depth",
                f"{self.query.depth}, but the blocks of {self.model} have a fixed depth; give 1, "
                f"or detector.model = d-fine",
            )
        return self

    @model_validator(mode="after")
    def _frozen_fits(self) -> DetectorSection:
        if self.frozen == "res5" and self.model not in (*DENSE_MODELS, "fcn"):
            reject(
                "frozen",
                f"res5, but {self.model} works on images; give detector.model = fcos-fpn, or "
                f"freeze up to res4",
            )
        return self


class DetectionDataSection(Section):
    train_splits: Annotated[list[str], Field(min_length=1)] = ["train"]
    """Splits to train on, joined. In a VOC tree, `trainval` means that of every year and
    `2007/trainval` that of one year; in COCO's layout, `train2017` means
    annotations/instances_train2017.json."""
    test_splits: Annotated[list[str], Field(min_length=1)] = ["val"]
    """Splits to test on, joined."""
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Test on this share of the labelled training images, and train on the rest: to choose settings
    without the test splits, which are then not opened."""
    labels: Annotated[
        Positive | Labels | LabelList | None,
        expects(
            "a number of images, a share such as 10%, all, the path of a labels.json, or a list "
            "of two or more numbers and shares such as 50,100,all"
        ),
    ] = None
    """Train only on this number of labelled images, on this share of them (`1%`), or on those that
    a labels.json names. A list of numbers and shares, such as [50, 100, all], evaluates each and
    says how many labels the weights save."""
    labels_vary: bool = False
    """Every seed draws its own images, so that intervals include the chance of the draw. Otherwise
    all seeds train on the same ones. They are stored in labels.json."""
    labels_draw: Literal["stratified", "random"] = "stratified"
    """stratified: every class keeps its share, and none is lost; such images hold more objects than
    the average image. random: as published few-label results draw."""
    labels_seed: Seed = 0
    """Seed of that draw."""
    train_sizes: Annotated[list[ImageSide], Field(min_length=1)] = list(range(480, 801, 32))
    """Short sides, pixels; one is drawn for every training image. Exactly one if all of the
    backbone is frozen."""
    test_size: ImageSide = 800
    """Short side in testing, pixels."""
    max_size: ImageSide = 1333
    """Limit of the long side, pixels."""
    square: bool = False
    """Resize to squares of these sizes, whatever the shape of the image, as RT-DETR and D-FINE do:
    no padding, and one size for all images of a batch."""
    flip: bool = True
    """Horizontal flip with probability 0.5 in training."""
    keypoint_flips: list[Annotated[int, Field(ge=0)]] | None = None
    """The number of the keypoint that each becomes in a mirrored image, such as [0, 2, 1] for nose,
    left eye, right eye. By default as the set says (flip_idx of YOLO's data.yaml), or COCO's for 17
    keypoints."""
    group_by_aspect: bool = True
    """Form batches of only wide or only tall images, so that less of a batch is padding."""
    test_images: Positive | None = None
    """Test on only this many images, the first ones; on all by default."""


class DetectionTrainSection(Section):
    iterations: Positive = 24_000
    batch_size: Positive = 16
    """Images per iteration, over all devices."""
    reference_devices: Positive = 8
    """Number of devices that the schedule is meant for; `--scale-to-device` scales batch, lr and
    schedule to the number of available devices."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    lr_grid: list[Annotated[float, Field(gt=0)]] = []
    """Factors of lr to try for each of the weights before its trials: the one with the highest AP
    on a validation part of the training labels is used. All weights get the same grid; the test
    images play no part. Empty: lr itself for all."""
    lr_validation: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the labelled images that validates lr_grid; the trials themselves train on all."""
    backbone_lr: Annotated[float, Field(gt=0)] = 1.0
    """Factor of lr for the backbone; the head always has lr itself."""
    freeze_iterations: Annotated[int, Field(ge=0)] = 0
    """The backbone is not trained before this iteration, while the new layers settle."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Gradients with a larger norm, over all parameters together, are scaled down to it."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Iterations over which lr rises linearly to its value."""
    schedule: Literal["steps", "cosine"] = "steps"
    """lr after the warm-up: a tenth at each of the milestones, or half a cosine to 0."""
    milestones: list[Positive] = [18_000, 22_000]
    """Iterations at which lr is multiplied by 0.1; [] for a cosine."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's arithmetic; losses and boxes stay float32."""
    workers: Annotated[int, Field(ge=0)] = 4
    log_every: Positive = 20
    checkpoint_every: Positive = 1000
    """Iterations between checkpoints, from which an interrupted trial continues."""

    @model_validator(mode="after")
    def _grid_has_no_repetition(self) -> DetectionTrainSection:
        if len(set(self.lr_grid)) < len(self.lr_grid) or len(self.lr_grid) == 1:
            reject("lr_grid", f"{self.lr_grid}; give at least two factors, each once, or []")
        return self

    @model_validator(mode="after")
    def _milestones_in_order(self) -> DetectionTrainSection:
        if sorted(set(self.milestones)) != self.milestones:
            reject("milestones", f"{self.milestones}, but iterations must rise without repetition")
        if self.milestones and self.milestones[-1] >= self.iterations:
            reject(
                "milestones",
                f"{self.milestones}, but the schedule ends at train.iterations = "
                f"{self.iterations}; give smaller milestones, or [] for a constant lr",
            )
        if self.milestones and self.schedule == "cosine":
            reject("milestones", f"{self.milestones}, but train.schedule is cosine; give []")
        return self


class DetectionTestSection(Section):
    metric: Literal["voc07", "voc10", "coco", "miou"] = "voc07"
    """VOC's average precision at 11 recall points (VOC 2007) or as area under the curve (from
    2010), or COCO's for boxes and, if the detector has them, masks. miou: mean intersection over
    union, for semantic segmentation."""
    every: Annotated[int, Field(ge=0)] = 0
    """Iterations between tests, for the learning curve; 0: only at the end."""
    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    """RT-DETR and D-FINE have no non-maximum suppression."""
    detections_per_image: Positive = 100
    keypoint_sigmas: (
        list[Annotated[float, Field(gt=0)]] | dict[str, list[Annotated[float, Field(gt=0)]]] | None
    ) = None
    """How exactly each keypoint can be placed, for OKS: a share of the square root of the object's
    area, one for each keypoint, for all classes or for each by its name. By default COCO's for 17
    keypoints."""
    precise_bn_batches: Annotated[int, Field(ge=0)] = 200
    """Training batches over which batch-norm statistics are re-estimated before testing."""
    pictures: Annotated[int, Field(ge=0)] = 6
    """Number of test images drawn with detections beside the ground truth: best, worst and random
    ones."""


class EvaluateRecipe(Section):
    """Fine-tunes a detector or an FCN on a labelled set and tests it with the protocol's metric."""

    stage: Literal["evaluate"] = "evaluate"
    description: str = ""
    """One line for `dupr recipe list`."""
    name: str = ""
    """Name of the protocol in the results."""
    protocol: Literal["voc", "coco", "yolo", "cityscapes", "semantic"] = "voc"
    """The `dupr evaluate` command that runs it."""
    detector: DetectorSection = DetectorSection()
    semantic: SemanticSection = SemanticSection()
    """Only for detector.model = fcn."""
    data: DetectionDataSection = DetectionDataSection()
    train: DetectionTrainSection = DetectionTrainSection()
    test: DetectionTestSection = DetectionTestSection()
    seed: Seed = 0
    trials: Positive = 1
    """Number of trainings of each of the weights, with rising seeds from `seed`."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> EvaluateRecipe:
        largest = max(*self.data.train_sizes, self.data.test_size)
        if largest > self.data.max_size:
            reject(
                "data.max_size",
                f"{self.data.max_size}, but it limits the long side, and the recipe has a short "
                f"side of {largest}; raise it to at least {largest}",
            )
        self._queries_have_cells()
        self._semantic_fits()
        if self.is_frozen and not self.is_semantic and len(self.data.train_sizes) > 1:
            reject(
                "data.train_sizes",
                f"{self.data.train_sizes}, but the features of a frozen backbone are computed "
                f"once, at one size; give one",
            )
        if self.detector.frozen is not None and not self.test.precise_bn_batches:
            reject(
                "test.precise_bn_batches",
                "0, but the batch norm of a frozen backbone is measured over them; give at least 1",
            )
        if self.has_masks and self.test.metric != "coco":
            reject(
                "test.metric",
                f"{self.test.metric}, but {self.detector.model} has masks, which only coco "
                f"measures",
            )
        if self.has_keypoints and self.test.metric != "coco":
            reject(
                "test.metric",
                f"{self.test.metric}, but {self.detector.model} has keypoints, which only coco "
                f"measures",
            )
        return self

    def _semantic_fits(self) -> None:
        """The keys of detectors' images have no meaning for an FCN, nor its own for detectors."""
        if not self.is_semantic:
            if self.semantic != SemanticSection():
                reject(
                    "semantic",
                    f"set, but {self.detector.model} finds objects; remove it, or give "
                    f"detector.model = fcn",
                )
            if self.test.metric == "miou" or self.protocol == "semantic":
                key = "protocol" if self.protocol == "semantic" else "test.metric"
                reject(
                    key,
                    f"{self.protocol if key == 'protocol' else 'miou'}, but "
                    f"{self.detector.model} finds objects; give detector.model = fcn",
                )
            return
        if self.protocol != "semantic":
            reject("protocol", f"{self.protocol}, but the model is fcn; give semantic")
        if self.test.metric != "miou":
            reject("test.metric", f"{self.test.metric}, but the model is fcn; give miou")
        for key in ("train_sizes", "test_size", "max_size", "square", "group_by_aspect"):
            value = getattr(self.data, key)
            if value != DetectionDataSection.model_fields[key].default:
                reject(
                    f"data.{key}",
                    f"{value}, which has no meaning for fcn; give semantic.short_side, "
                    f"semantic.scale and semantic.crop",
                )
        if self.is_frozen and self.semantic.window is not None:
            reject(
                "semantic.window",
                f"{self.semantic.window}, but features of a frozen backbone are those of whole "
                f"images; leave it out",
            )

    def _queries_have_cells(self) -> None:
        model, data = self.detector.model, self.data
        if model not in QUERY_MODELS:
            return
        if not data.square:
            reject(
                "data.square",
                f"false, but {model} is trained and tested on squares, without padding; give true",
            )
        for key, sizes in (("train_sizes", data.train_sizes), ("test_size", [data.test_size])):
            uneven = [size for size in sizes if size % LEVEL_STRIDES["res5"]]
            if uneven:
                reject(
                    f"data.{key}",
                    f"{uneven[0]}, but squares of {model} must be multiples of the stride of res5, "
                    f"{LEVEL_STRIDES['res5']}",
                )
        smallest = min(*data.train_sizes, data.test_size)
        levels: tuple[Level, ...] = ("res3", "res4", "res5")
        cells = sum((smallest // LEVEL_STRIDES[level]) ** 2 for level in levels)
        if self.detector.query.queries > cells:
            reject(
                "detector.query.queries",
                f"{self.detector.query.queries}, but an image of {smallest} x {smallest} pixels "
                f"has {cells} cells from which queries start; give at most {cells}, or larger "
                f"images",
            )

    @property
    def has_masks(self) -> bool:
        return self.detector.model.startswith("mask-rcnn")

    @property
    def has_keypoints(self) -> bool:
        return self.detector.model.startswith("keypoint-rcnn")

    @property
    def is_semantic(self) -> bool:
        """Whether it gives every pixel a class, in place of finding objects."""
        return self.detector.model == "fcn"

    @property
    def dilates(self) -> bool:
        """Whether res5 gets the stride of res4."""
        return self.is_semantic and self.semantic.output_stride < LEVEL_STRIDES["res5"]

    @property
    def primary_metric(self) -> str:
        """The metric that decides."""
        return "mIoU" if self.is_semantic else "AP"

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of the backbone is trained, so that its features can be stored."""
        return self.detector.frozen == "res5"


def label_count(labels: int | str, images: int) -> int:
    """Number of `images` labelled images that `data.labels` selects; at least one."""
    if isinstance(labels, int):
        return min(labels, images)
    if labels == "all":
        return images
    share = float(re.sub("%$", "", labels)) / 100
    return min(images, max(1, round(share * images)))
