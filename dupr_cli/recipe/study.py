"""The recipe of `dupr study`: which runs make up one table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.recipe.base import PERMUTED, Section, Seed, expects, reject
from dupr_cli.recipe.evaluate import LabelList

Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][\w.+-]*$"),
    expects("letters, digits and any of . + - _, because a folder is named after it"),
]


class StudyMethodSection(Section):
    recipe: str
    """A recipe of `dupr pretrain`: a file, or the name of a shipped one."""
    set: list[str] = []
    """Overrides of its keys, as --set takes them."""


class StudyProtocolSection(Section):
    recipe: str
    """A recipe of `dupr evaluate voc|coco|yolo|cityscapes|semantic`: a file or a shipped one's
    name."""
    set: list[str] = []
    """Overrides of its keys, as --set takes them."""
    seeds: Annotated[int, Field(ge=1)] = 5
    """Trials of each start."""
    labels: LabelList | None = None
    """Numbers and shares of labelled images, such as [50, 100, all]; all of them by default."""
    metric: Literal["AP", "AP50", "mIoU"] = "AP"
    """The metric that decides in the report, named beforehand. mIoU for semantic segmentation."""


class StudyResourcesSection(Section):
    """A cell runs in one process, on one device."""

    cpus: Annotated[int, Field(ge=1)] = 2
    gpus: Annotated[float, Field(ge=0, le=1)] = 0


class StudyRecipe(Section):
    """Methods x pre-training seeds x protocols x numbers of labels x seeds, as one table."""

    stage: Literal["study"] = "study"
    description: str = ""
    """One line for `dupr recipe list`."""
    name: str = ""
    """Name of the study in its report."""
    shards: str = ""
    """Unlabelled shards to pre-train on."""
    data: str = ""
    """The labelled set, as `dupr evaluate` takes it."""
    methods: Annotated[dict[Name, StudyMethodSection], Field(min_length=1)]
    """What is pre-trained, by name."""
    pretrain_set: list[str] = []
    """Overrides for all methods, such as train.precision=bfloat16; a method's own come after."""
    pretrain_seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    """Every method is pre-trained with each of these seeds."""
    controls: list[str] = ["none"]
    """Further starts: none, weights that `dupr evaluate` takes, or permuted:METHOD, which shuffles
    each run of that method."""
    baseline: str = "none"
    """The start that others are compared with: a method or a control."""
    protocols: Annotated[dict[Name, StudyProtocolSection], Field(min_length=1)]
    """How each start is evaluated, by name."""
    evaluate_set: list[str] = []
    """Overrides for all protocols; a protocol's own come after."""
    resources: StudyResourcesSection = StudyResourcesSection()
    """What each chain of runs asks a Ray cluster for."""

    @model_validator(mode="after")
    def _names_exist(self) -> StudyRecipe:
        for control in self.controls:
            method = control.removeprefix(PERMUTED)
            if control != method and method not in self.methods:
                reject("controls", f"{control}, but methods has no {method}")
            if control in self.methods:
                reject("controls", f"{control}, but a method has this name; rename the method")
        if len(set(self.controls)) < len(self.controls):
            reject("controls", f"{self.controls}; give each once")
        if self.baseline not in (*self.methods, *self.controls):
            reject(
                "baseline",
                f"{self.baseline}, which is neither a method nor a control; the study has "
                f"{', '.join((*self.methods, *self.controls))}",
            )
        if len(set(self.pretrain_seeds)) < len(self.pretrain_seeds):
            reject("pretrain_seeds", f"{self.pretrain_seeds}; give each seed once")
        return self
