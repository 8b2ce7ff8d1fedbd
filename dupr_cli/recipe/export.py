"""The recipe of `dupr export`: the weights, their layouts, and the content of the model card."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.plugins import EXPORT_FORMATS, is_plugin, plugin_names
from dupr_cli.recipe.base import Section, reject


class CardSection(Section):
    license: str = "other"
    """License of the weights, by its name on the Hugging Face Hub: apache-2.0, cc-by-4.0, other,
    ...; also written into timm's config.json. It depends on the training images; `other` grants
    nothing unless license_name and license_link follow."""
    license_name: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9.-]*)?$")] = ""
    """Name of a license that the Hub does not list, such as my-company-license; with `other`."""
    license_link: Annotated[str, Field(pattern=r"^(https://\S+)?$")] = ""
    """Address of its text; with `other`."""
    datasets: list[str] = []
    """Names of the pre-training data sets on the Hub."""
    base_model: str = ""
    """OWNER/NAME on the Hub of the weights from which these were made or their training started;
    not needed if the address began with hf://."""
    tags: list[str] = []
    """Further tags besides dupr's own."""
    about: str = ""
    """A paragraph of your own: what the images are, what the weights are for."""
    pictures: list[str] = []
    """PNG or JPEG files to show on the card, such as those of `dupr inspect` or of an evaluation.
    They are published with the weights, so choose images that you may publish."""

    @model_validator(mode="after")
    def _license_is_whole(self) -> CardSection:
        if bool(self.license_name) != bool(self.license_link):
            reject("license_name", f"{self.license_name!r}, but license_name and license_link "
                   f"belong together: give both or neither")  # fmt: skip
        if self.license_name and self.license != "other":
            reject("license", f"{self.license}, but license_name describes another license; use "
                   f"`other`, or give no license_name")  # fmt: skip
        return self


class ExportRecipe(Section):
    """Writes the backbone weights of a run in the layouts that frameworks load."""

    stage: Literal["export"] = "export"
    description: str = ""
    """One line for `dupr recipe list`."""
    formats: Annotated[list[str], Field(min_length=1)] | None = None
    """Layouts: torchvision, timm, transformers, detectron2, mmdetection, onnx, or those of other
    packages; by default that of the network's own library. A single one is written to the top of
    the output, several each to its own folder (timm's to the top, where its loader looks)."""
    encoder: Literal["query", "key"] = "query"
    """The encoder whose backbone is exported: the one trained by gradient (query, which MoCo
    transfers) or its moving average (key)."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the tensors in the files; the 16-bit types halve the size and round the values."""
    card: CardSection = CardSection()

    @model_validator(mode="after")
    def _known_formats(self) -> ExportRecipe:
        formats = self.formats or []
        for name in formats:
            if not is_plugin(EXPORT_FORMATS, name):
                known = ", ".join(plugin_names(EXPORT_FORMATS))
                reject("formats", f"{formats}, but {name} is unknown; use {known}")
        if len(set(formats)) < len(formats):
            reject("formats", f"{formats}, but each format may be given only once")
        return self
