"""The recipe of `dupr pretrain`: method, optimisation, data.

The defaults are the values at the paper's scale; docs/method.md gives the source of each.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from dupr_cli.plugins import METHODS, plugin_names
from dupr_cli.recipe.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LEVEL_STRIDES,
    LEVELS,
    BackboneName,
    Fraction,
    Level,
    Section,
    Seed,
    reject,
)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Temperature = Annotated[float, Field(gt=0.0, le=10.0)]
Head = Literal["mlp", "linear"]
# The method that weights record for this recipe, see MethodSection.title.
DUPR = "DUPR"


class ModelSection(Section):
    backbone: BackboneName = "resnet50"
    """torchvision's resnet18, resnet34, resnet50, resnet101, resnext50_32x4d or wide_resnet50_2,
    timm:NAME for a network of timm's that returns maps of strides 4 to 32 (needs the extra `timm`),
    transformers:NAME or transformers:PATH/config.json for a backbone of transformers' (needs the
    extra `transformers`), or FAMILY:NAME of another package."""
    init: str | None = None
    """Weights from which the backbones of both encoders start: a run, a weights file (`dupr import`
    makes one from a public checkpoint), hf://OWNER/NAME, torchvision:NAME (IMAGENET1K_V2) or
    timm:NETWORK.TAG (timm:convnext_tiny.fb_in1k). Random by default."""


class ViewsSection(Section):
    size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Side of the square views, pixels."""
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a crop."""
    min_overlap: Fraction = 0.25
    """Smallest shared region, as a share of the side, in both directions of both views."""
    overlap_attempts: Positive = 10
    """Number of pairs of crops drawn to find one that overlaps enough; if all fail, the image is
    left out of the patch loss for this step."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> ViewsSection:
        if not 0 < self.scale[0] <= self.scale[1]:
            reject("scale", f"{list(self.scale)}, but it must be [smallest, largest], above 0")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            reject("ratio", f"{list(self.ratio)}, but it must be [smallest, largest], above 0")
        return self


class ColorJitterSection(Section):
    probability: Fraction = 0.8
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1


class BlurSection(Section):
    probability: Fraction = 0.5
    sigma: tuple[Annotated[float, Field(gt=0, le=8)], Annotated[float, Field(gt=0, le=8)]] = (
        0.1,
        2.0,
    )
    """Smallest and largest standard deviation, in pixels of the view."""


class AugmentationSection(Section):
    color_jitter: ColorJitterSection = ColorJitterSection()
    grayscale_probability: Fraction = 0.2
    blur: BlurSection = BlurSection()
    flip_probability: Fraction = 0.5
    flip_together: bool = False
    """Mirror both views of an image or neither, instead of each by its own chance."""
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = IMAGENET_MEAN
    """Value subtracted from each channel, in units of the full range; one for each channel that the
    shards keep (`dupr prepare stats` measures them)."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = IMAGENET_STD
    """Value that each channel is divided by."""

    @model_validator(mode="after")
    def _one_each(self) -> AugmentationSection:
        if len(self.mean) != len(self.std):
            reject(
                "std",
                f"{list(self.std)}, but method.augmentation.mean has {len(self.mean)} values; give "
                f"one for each channel in both",
            )
        return self

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)


class ImageReidSection(Section):
    weights: dict[Level, NonNegative] = {"res2": 0.1, "res3": 0.4, "res4": 0.7, "res5": 1.0}
    """Weight alpha of each level; a level that is absent or 0 has no image loss."""
    temperature: Temperature = 0.2
    head: Head = "mlp"
    """mlp: Linear(C, C), ReLU, Linear(C, D); linear: Linear(C, D)."""


class PatchReidSection(Section):
    weights: dict[Level, NonNegative] = {"res4": 1.0, "res5": 1.0}
    """Weight beta of each level; a level that is absent or 0 has no patch loss."""
    bins: dict[Level, Positive] = {"res2": 3, "res3": 3, "res4": 14, "res5": 7}
    """Number S for each level: the shared region is pooled into S x S patches."""
    cell_centres: Literal["backbone", "convention"] = "backbone"
    """Where a level's cells are taken to lie when bins are pooled: where the backbone's layout
    centres them, or at (i + 1/2) strides as RoIAlign and detectors do. In a ResNet the convention
    moves the bins of mirrored views apart by stride - 1 pixels."""
    temperature: Temperature = 0.2
    head: Head = "mlp"
    """mlp: 1x1 convolutions C to C, ReLU, C to D; linear: one, C to D."""


class BatchNormSection(Section):
    groups: Positive = 8
    """Number of groups in which the global batch is normalised, as if on that many devices; each of
    several devices takes its share of the groups."""
    sync: bool = False
    """Use statistics of the whole global batch (synchronised batch norm); groups must be 1."""
    permute_keys: bool = True
    """Shuffle the key batch over all devices, so that the group of a key reveals nothing about that
    of its query."""

    @model_validator(mode="after")
    def _one_group_when_synchronised(self) -> BatchNormSection:
        if self.sync and self.groups != 1:
            reject("groups", f"{self.groups}, but method.batch_norm.sync makes one group; use 1")
        return self


class MethodSection(Section):
    name: str = "dupr"
    """dupr, densecl, or a method that another package provides (docs/plugins.md)."""
    options: dict[str, JsonValue] = {}
    """Keys that such a method defines itself."""
    views: ViewsSection = ViewsSection()
    augmentation: AugmentationSection = AugmentationSection()
    image: ImageReidSection = ImageReidSection()
    patch: PatchReidSection = PatchReidSection()
    symmetric: bool = False
    """Use each view as query and as key: the loss is the mean of both directions, and the keys of
    both views enter the queues."""
    embedding_dim: Positive = 128
    momentum: Fraction = 0.999
    """The key encoder is momentum * key + (1 - momentum) * query after each step."""
    momentum_end: Fraction | None = None
    """Momentum of the last step, to which it rises by half a cosine; null keeps it constant. A low
    start lets the key encoder leave its random weights, a high end gives stable keys."""
    queue_length: Positive = 65_536
    """Number of keys in each queue; each level and kind has its own queue."""
    patch_keys_per_image: Positive = 1
    """Patches of each key image, drawn at random, that enter a level's patch queue per step."""
    batch_norm: BatchNormSection = BatchNormSection()

    @model_validator(mode="after")
    def _known(self) -> MethodSection:
        if self.momentum_end is not None and self.momentum_end < self.momentum:
            reject("momentum_end", f"{self.momentum_end}, below method.momentum {self.momentum}")
        names = plugin_names(METHODS)
        if self.name not in names:
            near = get_close_matches(self.name, names, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(names)}"
            reject("name", f"{self.name}, which is not a method. {hint}")
        return self

    @property
    def levels(self) -> list[Level]:
        """Levels at which there is a loss, the finest first."""
        return [v for v in LEVELS if self.image.weights.get(v) or self.patch.weights.get(v)]

    @property
    def title(self) -> str:
        """The method's name in the literature; `dupr` without patches is one of its baselines."""
        if self.name != "dupr":
            return {"densecl": "DenseCL"}.get(self.name, self.name)
        if any(self.patch.weights.values()):
            return DUPR
        levels = sorted(level for level, weight in self.image.weights.items() if weight)
        return "MoCo v2" if levels == ["res5"] else f"image contrast at {', '.join(levels)}"


class OptimizerSection(Section):
    lr: Annotated[float, Field(gt=0)] = 0.03
    """Learning rate at the given batch size; it is never scaled automatically."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which lr rises linearly to its value."""
    schedule: Literal["cosine", "constant"] = "cosine"


class DataSection(Section):
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step, over all devices."""
    split: str = "train"
    """Split of the shards to train on."""
    holdout: Annotated[int, Field(ge=0)] = 512
    """Number of images kept out of training for the patch retrieval probe, at most a tenth of the
    data; they are the same in every run on the same shards."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Number of processes that decode and crop; with 0 the main process does it."""
    shuffle_shards: Positive = 16
    """Number of shards within which samples are shuffled; the order of shards is shuffled too."""


class TrainSection(Section):
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    """Length of the run: give epochs or steps, not both."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the encoders' forward pass and of products with the queues (autocast; float16
    with a loss scaler). Weights, sums and losses are always float32."""
    tf32: bool = False
    """Let NVIDIA GPUs round the factors of float32 products to 10 bits."""
    channels_last: bool = True
    compile: bool = False
    """Compile the backbones with torch.compile: minutes at the start, faster steps."""
    activation_checkpointing: bool = False
    """Recompute the stages of the query encoder in the backward pass, which needs less memory and
    about a third more time."""
    accumulate: Positive = 1
    """Number of parts in which each device processes its share of the batch, summing gradients, to
    save memory. Losses, queues and the groups of batch norm stay those of the whole batch."""
    max_bad_steps: Positive = 10
    """Number of successive steps with a loss or gradient that is not finite after which the run
    stops; such steps are skipped."""
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    probe_every: Positive = 2000
    """Steps between measurements of held-out patch retrieval; also at the start and the end."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are a multiple of this are never deleted."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            found = "neither is given" if self.steps is None else "both are given"
            reject("steps", f"{self.steps}, but give train.steps or train.epochs: {found}")
        return self


class PretrainRecipe(Section):
    """Deeply unsupervised patch re-identification: image and patch Re-ID at several levels."""

    stage: Literal["pretrain"] = "pretrain"
    description: str = ""
    """One line for `dupr recipe list`."""
    model: ModelSection = ModelSection()
    method: MethodSection = MethodSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    train: TrainSection
    seed: Seed = 0

    @model_validator(mode="after")
    def _levels_and_bins(self) -> PretrainRecipe:
        method = self.method
        active = [w for w in (*method.image.weights.values(), *method.patch.weights.values()) if w]
        if not active:
            reject(
                "method.image.weights",
                "0 at every level, and so is method.patch.weights, so no loss remains; raise one",
            )
        for level, weight in method.patch.weights.items():
            if not weight:
                continue
            if level not in method.patch.bins:
                reject(
                    "method.patch.bins",
                    f"{dict(method.patch.bins)}, but method.patch.weights has a loss at {level}; "
                    f"give bins for {level}",
                )
            cells = -(-method.views.size // LEVEL_STRIDES[level])
            bins = method.patch.bins[level]
            if bins > cells:
                shared = method.views.min_overlap * method.views.size / LEVEL_STRIDES[level]
                reject(
                    f"method.patch.bins.{level}",
                    f"{bins}, but a view of {method.views.size} pixels has {cells} x {cells} "
                    f"cells at {level} (stride {LEVEL_STRIDES[level]}), and the smallest shared "
                    f"region {shared:.1f}. Use at most {cells}, or raise method.views.size",
                )
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> PretrainRecipe:
        batch, method = self.data.batch_size, self.method
        directions = 2 if method.symmetric else 1
        keys = batch * method.patch_keys_per_image * directions
        if keys > method.queue_length:
            reject(
                "method.queue_length",
                f"{method.queue_length}, less than the {keys} keys that enter in one step "
                f"(data.batch_size x method.patch_keys_per_image"
                f"{' x 2 directions' if method.symmetric else ''}); use at least {keys}",
            )
        if batch % method.batch_norm.groups:
            reject(
                "method.batch_norm.groups",
                f"{method.batch_norm.groups}, which does not divide data.batch_size = {batch}",
            )
        if batch % self.train.accumulate:
            reject(
                "train.accumulate",
                f"{self.train.accumulate}, which does not divide data.batch_size = {batch}",
            )
        if not method.batch_norm.sync and method.batch_norm.groups % self.train.accumulate:
            reject(
                "train.accumulate",
                f"{self.train.accumulate}, but the batch is normalised in "
                f"{method.batch_norm.groups} groups (method.batch_norm.groups), and no part may "
                f"split a group; use a divisor of {method.batch_norm.groups}",
            )
        if batch // method.batch_norm.groups < 2:
            reject(
                "method.batch_norm.groups",
                f"{method.batch_norm.groups}, which leaves one image per group of "
                f"data.batch_size = {batch}; batch norm needs at least 2",
            )
        for level in method.patch.bins:
            if method.patch_keys_per_image > method.patch.bins[level] ** 2 and (
                method.patch.weights.get(level)
            ):
                reject(
                    "method.patch_keys_per_image",
                    f"{method.patch_keys_per_image}, but {level} has only "
                    f"{method.patch.bins[level] ** 2} patches per image (method.patch.bins)",
                )
        return self
