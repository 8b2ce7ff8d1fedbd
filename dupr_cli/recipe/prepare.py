"""The recipe of `dupr prepare`: how images become shards."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dupr_cli.plugins import SOURCES, is_plugin, plugin_names
from dupr_cli.recipe.base import Fraction, Section, Seed, reject

Side = Annotated[int, Field(ge=1)]


class SourceSection(Section):
    kind: str = "auto"
    """What SOURCE is: auto sees it from its contents; or folder, classes, archive, shards, voc,
    coco, yolo, hf, list, or a source of another package."""
    splits: list[str] | None = None
    """Splits of the source to prepare; by default all that it has. Of a VOC tree the files of
    ImageSets/Main, also of one year (2007/test); by default train, val and test as far as they are
    there, else trainval."""
    column: str | None = None
    """Column of a CSV, Parquet or Hugging Face source that holds the images or their addresses; by
    default the one that is named so."""
    images: str | None = None
    """Folder of the images of a COCO file, where they are not beside it."""
    identity: Literal["times", "content"] = "times"
    """What decides whether an image is still the one that was prepared: times is its name, size and
    modification time, and those of its labels; content is the sha256 of its bytes and labels, for
    files whose times change when they are copied. It reads the whole source at every call."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.kind != "auto" and not is_plugin(SOURCES, self.kind):
            known = ["auto", *plugin_names(SOURCES)]
            reject("kind", f"it is {self.kind!r}, but it should be one of {', '.join(known)}")
        return self


class ShardSection(Section):
    max_samples: Annotated[int, Field(ge=1)] = 1000
    """Images of the source per shard. What is left out of them makes the shard smaller, so that no
    shard depends on another."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Begin another shard before one grows beyond this; one larger image is a shard of its own."""
    shuffle: bool = False
    """Shuffle all images of a split, by `seed`; otherwise they keep the order of the source."""


class SplitSection(Section):
    held_out: Fraction = 0.0
    """Share of the train split that becomes a split of its own, by a hash of the key: an image
    stays on its side when others are added."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] = "held_out"
    """Name of that split."""


class ImageSection(Section):
    format: Literal["keep", "jpeg", "png", "webp"] = "keep"
    """keep leaves the bytes untouched where nothing has to change; an image that must change is
    written as JPEG if it was one, else as PNG."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of a JPEG or WebP that is written anew."""
    max_side: Side | None = None
    """Shrink an image until its longer side has this many pixels. None is enlarged."""
    min_side: Side | None = None
    """Shrink an image until its shorter side has this many pixels. None is enlarged."""
    resample: Literal["lanczos", "area"] = "lanczos"
    """How images are shrunk."""
    verify: Literal["full", "sampled", "header"] = "full"
    """How much of an image that stays as it is, is decoded to see that it is whole: all of it; all
    of every 20th, by a hash of its key, and the header of the others; the header."""
    range: tuple[float, float] | None = None
    """Values that become black and white, of images with more than 8 bits. By default a 16 bit
    image uses all its depth, floats run from 0 to 1 or 255, integers of 32 bits from 0 to 255; an
    image that does not fill a quarter of that, or exceeds it, is skipped."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Images of more pixels (width x height) are skipped before they are decoded."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            reject("range", f"it is {list(self.range)}, but the first has to be below the second")
        return self

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if self.max_side is not None and self.min_side is not None:
            reject(
                "min_side", "max_side is set too, and an image can be shrunk to one of them only"
            )
        return self


class FilterSection(Section):
    min_side: Side = 1
    """Skip images whose shorter side is shorter, in the source."""
    max_aspect: Annotated[float, Field(ge=1.0)] | None = None
    """Skip images whose longer side is more than this many times the shorter."""
    duplicates: Literal["auto", "keep", "exact", "near"] = "auto"
    """exact skips files of the same bytes as an earlier one (sha256), near also pictures that look
    the same (perceptual hash), over all splits; auto is keep for labelled sources, whose images
    count as they are, and exact for others."""
    near_distance: Annotated[int, Field(ge=0, le=12)] = 4
    """Bits of 64 in which the perceptual hashes of two pictures that look the same may differ."""


class PrepareRecipe(Section):
    """Shards from images of any layout: folders, archives, shards, VOC, COCO, YOLO, lists."""

    stage: Literal["prepare"] = "prepare"
    description: str = ""
    """One line for `dupr recipe list`."""
    source: SourceSection = SourceSection()
    shard: ShardSection = ShardSection()
    split: SplitSection = SplitSection()
    image: ImageSection = ImageSection()
    filter: FilterSection = FilterSection()
    seed: Seed = 0
    """Of the shuffle."""
