"""The recipe of `dupr prepare`: how images become shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dupr_cli.recipe.base import Section


class ShardSection(Section):
    max_samples: Annotated[int, Field(ge=1)] = 1000
    """Samples per shard; the last shard of a split holds what is left."""


class ImageSection(Section):
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of a JPEG that must be written anew (rotated by EXIF, grey, CMYK). An RGB image
    that needs no change keeps its bytes."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Images of more pixels (width x height) are skipped before they are decoded."""


class VocSection(Section):
    splits: list[str] | None = None
    """Files of ImageSets/Main to prepare, without .txt. By default train, val and test, as far
    as the tree has them, else trainval."""


class PrepareRecipe(Section):
    """Shards from a folder of images, a PASCAL VOC tree or WebDataset shards."""

    stage: Literal["prepare"] = "prepare"
    description: str = ""
    """One line for `dupr recipe list`."""
    shard: ShardSection = ShardSection()
    image: ImageSection = ImageSection()
    voc: VocSection = VocSection()
