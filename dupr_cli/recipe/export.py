"""The recipe of `dupr export`: which weights, in which layouts, and what the model card says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.plugins import EXPORT_FORMATS, is_plugin, plugin_names
from dupr_cli.recipe.base import Section, reject


class CardSection(Section):
    license: str = "other"
    """Of the weights, as the Hugging Face Hub names licences: apache-2.0, cc-by-4.0, other, ...;
    also in timm's config.json. It depends on the images that were used: `other` grants nothing."""
    datasets: list[str] = []
    """Names of the data sets that were pre-trained on, as the Hub has them."""
    base_model: str = ""
    """OWNER/NAME on the Hub of the weights that these are made of, or whose training started there;
    known without this where their address began with hf://."""
    tags: list[str] = []
    """Further tags, beside dupr's own."""
    about: str = ""
    """A paragraph of one's own: what the images are, what the weights are for."""


class ExportRecipe(Section):
    """Backbone weights of a run in the layouts that frameworks load."""

    stage: Literal["export"] = "export"
    description: str = ""
    """One line for `dupr recipe list`."""
    formats: Annotated[list[str], Field(min_length=1)] = ["torchvision"]
    """Layouts: torchvision, timm, transformers, detectron2, mmdetection, onnx, or those of other
    packages. A single one lies at the top of the output, of several each in its folder (timm's at
    the top: its loader looks nowhere else)."""
    encoder: Literal["query", "key"] = "query"
    """Which encoder's backbone: the one trained by gradient (query, what MoCo transfers) or its
    moving average (key)."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the tensors in the files; half the size, and rounded."""
    card: CardSection = CardSection()

    @model_validator(mode="after")
    def _known_formats(self) -> ExportRecipe:
        for name in self.formats:
            if not is_plugin(EXPORT_FORMATS, name):
                known = ", ".join(plugin_names(EXPORT_FORMATS))
                reject("formats", f"{self.formats}, but {name} is none; there are {known}")
        if len(set(self.formats)) < len(self.formats):
            reject("formats", f"{self.formats}, but each format is given once")
        return self
