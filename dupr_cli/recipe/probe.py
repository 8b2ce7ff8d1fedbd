"""The recipe of the frozen-feature probes: `dupr evaluate knn`, `linear`, `voc07-cls` and
`patch-retrieval`.

`protocol` selects one; each reads `images`, `data`, `levels` and its own section.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.recipe.base import BackboneOrAuto, Fraction, ImageSide, Level, Section, Seed, reject
from dupr_cli.recipe.pretrain import BlurSection, ColorJitterSection, ViewsSection

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]

ProbeProtocol = Literal["knn", "linear", "linear-fast", "voc07-cls", "patch-retrieval"]


class ProbeImageSection(Section):
    resize: ImageSide = 256
    """Short side to which images are resized, pixels."""
    crop: Annotated[int, Field(ge=32)] = 224
    """Side of the square cut from the middle, pixels; also of a linear probe's random crops."""
    batch_size: Positive = 128
    """Number of images per pass of the backbone when nothing is trained."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the backbone; auto is bfloat16 on a GPU that supports it, otherwise float32."""
    workers: Annotated[int, Field(ge=0)] = 4
    bn_images: Annotated[int, Field(ge=2)] = 1024
    """Number of images on which the batch-norm statistics of random weights (none) are measured."""

    @model_validator(mode="after")
    def _crop_fits(self) -> ProbeImageSection:
        if self.crop > self.resize:
            reject("crop", f"{self.crop}, but it must not exceed images.resize, {self.resize}")
        return self


class ProbeDataSection(Section):
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the images held out for testing, chosen by a hash of their names, if the set has no
    test split; without this key it must have one."""
    limit: Positive | None = None
    """Use only this many training and this many test images, drawn with the seed."""
    min_object: Positive = 24
    """Smallest longer side of an object, pixels; smaller objects are left out when objects are
    classified."""


class KnnSection(Section):
    neighbours: Annotated[list[Positive], Field(min_length=1)] = [10, 20, 100, 200]
    """Numbers of neighbours that vote; each is measured."""
    shown: Positive = 20
    """The number of neighbours for which top-5, balanced accuracy and classes are reported."""
    temperature: AboveZero = 0.07
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""

    @model_validator(mode="after")
    def _shown_is_measured(self) -> KnnSection:
        if self.shown not in self.neighbours:
            reject("shown", f"{self.shown}, but it must be one of neighbours, {self.neighbours}")
        return self


class LinearSgdSection(Section):
    epochs: Positive = 100
    batch_size: Positive = 256
    lr: AboveZero = 30.0
    """Learning rate at batch size 256; it is scaled by batch_size / 256."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.0
    milestones: list[Positive] = [60, 80]
    """Epochs after which lr is multiplied by 0.1."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    ratio: tuple[AboveZero, AboveZero] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a random crop."""
    flip_probability: Fraction = 0.5

    @model_validator(mode="after")
    def _ranges_rise(self) -> LinearSgdSection:
        for key in ("scale", "ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                reject(key, f"{[low, high]}, but it must be [smallest, largest], above 0")
        if sorted(set(self.milestones)) != self.milestones:
            reject("milestones", f"{self.milestones}, but epochs must rise without repetition")
        return self


class LogisticSection(Section):
    penalties: Annotated[list[AboveZero], Field(min_length=1)] = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    """Factors of half the squared norm of the weights, added to the mean loss; one is chosen."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training images held out to choose the penalty."""
    iterations: Positive = 200
    """Largest number of steps of L-BFGS."""


class SvmSection(Section):
    costs: Annotated[list[AboveZero], Field(min_length=1)] = [0.01, 0.1, 1.0, 10.0, 100.0]
    """Values of C for the support vector machines; cross-validation chooses one per class."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Number of parts of the training images in cross-validation."""
    positive_weight: AboveZero = 2.0
    """Weight of an image with the class relative to one without."""


class RetrievalSection(Section):
    images: Positive = 1024
    """Number of images whose bins make up the pool, drawn with the seed; all if the set has
    fewer."""
    bins: Annotated[int, Field(ge=1, le=14)] = 4
    """The shared region is pooled into bins x bins at every level, to make levels comparable."""
    views: ViewsSection = ViewsSection()
    color_jitter: ColorJitterSection = ColorJitterSection()
    grayscale_probability: Fraction = 0.2
    blur: BlurSection = BlurSection()
    flip_probability: Fraction = 0.5
    object_side: Annotated[int, Field(ge=32)] = 448
    """Long side to which images are resized before their objects are pooled, pixels."""
    neighbours: Annotated[list[Positive], Field(min_length=1)] = [1, 5, 10]
    """Values of k for precision@k of objects."""


class ProbeRecipe(Section):
    """Measures the features of a backbone without training any of its weights."""

    stage: Literal["probe"] = "probe"
    description: str = ""
    """One line for `dupr recipe list`."""
    protocol: ProbeProtocol = "knn"
    backbone: BackboneOrAuto = "auto"
    """`auto` takes the architecture that the weights name (resnet50 if only `none` is given);
    otherwise as model.backbone of `dupr pretrain`."""
    levels: Annotated[list[Level], Field(min_length=1)] = ["res3", "res4", "res5"]
    """Levels whose features are probed, each separately."""
    images: ProbeImageSection = ProbeImageSection()
    data: ProbeDataSection = ProbeDataSection()
    knn: KnnSection = KnnSection()
    sgd: LinearSgdSection = LinearSgdSection()
    """Settings of the protocol linear."""
    logistic: LogisticSection = LogisticSection()
    """Settings of the protocol linear-fast."""
    svm: SvmSection = SvmSection()
    """Settings of the protocol voc07-cls."""
    retrieval: RetrievalSection = RetrievalSection()
    """Settings of the protocol patch-retrieval."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _levels_once(self) -> ProbeRecipe:
        if len(set(self.levels)) < len(self.levels):
            reject("levels", f"{self.levels}, but each level may be given only once")
        return self
