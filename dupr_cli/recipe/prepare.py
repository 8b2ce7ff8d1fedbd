"""The recipe of `dupr prepare`: how images become shards."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dupr_cli.plugins import SOURCES, is_plugin, plugin_names
from dupr_cli.recipe.base import Fraction, Section, Seed, expects, reject

Side = Annotated[int, Field(ge=1)]


Channels = Annotated[
    Literal["rgb"] | Annotated[int, Field(ge=1, strict=True)],
    expects("rgb, or the number of channels"),
]


class SourceSection(Section):
    kind: str = "auto"
    """Kind of SOURCE: auto detects it from the contents; otherwise folder, classes, archive,
    shards, voc, coco, yolo, masks, hf, list, or a source of another package."""
    splits: list[str] | None = None
    """Splits of the source to prepare; by default all. For a VOC tree, names of files in
    ImageSets/Main, also of a single year (2007/test); by default those of train, val and test that
    exist, and trainval if neither train nor val does."""
    column: str | None = None
    """Column of a CSV, Parquet or Hugging Face source that holds the images or their addresses; by
    default the one with a usual name."""
    images: str | None = None
    """Folder of the images of a COCO file, if they are not beside it."""
    identity: Literal["times", "content"] = "times"
    """What identifies an image that was prepared before: times compares names, sizes and
    modification times of the image and its labels; content compares the sha256 of the image's bytes
    and labels, for files whose times change when they are copied, and reads the whole source at
    every call."""
    max_bytes: Annotated[int, Field(ge=1)] = 536_870_912
    """Images of more bytes are skipped: before they are read if their size is known, as of files
    and members of archives, otherwise as soon as more have arrived. The default is the size of an
    RGB image of image.max_pixels, uncompressed."""
    max_seconds: Annotated[float, Field(gt=0)] = 300.0
    """An image at an address that has not arrived after this time, with all attempts, is
    skipped. For http and https; other schemes have the timeouts of their own packages."""
    min_rate: Annotated[float, Field(ge=0)] = 1000.0
    """Bytes per second: an attempt to fetch an image over http or https ends when fewer arrive
    within a minute."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.kind != "auto" and not is_plugin(SOURCES, self.kind):
            known = ["auto", *plugin_names(SOURCES)]
            reject("kind", f"{self.kind!r}, but it should be one of {', '.join(known)}")
        return self


class ShardSection(Section):
    max_samples: Annotated[int, Field(ge=1)] = 1000
    """Images of the source per shard. Images that are left out make the shard smaller, so that no
    shard depends on another."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Begin another shard before one exceeds this size; a larger image gets a shard of its own."""
    shuffle: bool = False
    """Shuffle all images of a split, by `seed`; otherwise they keep the order of the source."""


class SplitSection(Section):
    held_out: Fraction = 0.0
    """Share of the train split that becomes a separate split, chosen by a hash of the key, so that
    an image stays in its split when others are added."""
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_]+$"), expects("letters, digits and underscores")
    ] = "held_out"
    """Name of that split."""


class ImageSection(Section):
    format: Literal["keep", "jpeg", "png", "webp"] = "keep"
    """keep leaves the bytes of an image unchanged if possible; an image that must change is
    re-encoded as JPEG if it was one, otherwise as PNG."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of a JPEG or WebP that is re-encoded."""
    max_side: Side | None = None
    """Shrink an image until its longer side has this many pixels. Images are never enlarged."""
    min_side: Side | None = None
    """Shrink an image until its shorter side has this many pixels. Images are never enlarged."""
    resample: Literal["lanczos", "area"] = "lanczos"
    """Filter that shrinks images."""
    verify: Literal["full", "sampled", "header"] = "full"
    """How an unchanged image is checked: full decodes every image, sampled every 20th (by a hash of
    its key), header none; the header of every image is read in any case."""
    channels: Channels = "rgb"
    """rgb makes every image RGB of 8 bits. A number keeps images of that many channels with all
    their values, of 8 or 16 bits, and skips others; image.range says how they are scaled."""
    range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits. By default, 16-bit images
    use their full depth, floats run from 0 to 1 or 255, and 32-bit integers from 0 to 255; an image
    that does not fill a quarter of that, or exceeds it, is skipped. With a number of channels: the
    values that become 0 and 1 when an image is read; the shards keep all values."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Images of more pixels (width x height) are skipped before they are decoded."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            reject("range", f"{list(self.range)}, but the first must be below the second")
        return self

    @model_validator(mode="after")
    def _kept_as_they_are(self) -> Self:
        if self.channels == "rgb":
            return self
        if self.range is None:
            reject(
                "range",
                f"null, but with channels = {self.channels} images keep their values, and the two "
                f"that become 0 and 1 are not known; give them, such as [0, 255] for 8 bits, "
                f"[0, 4095] for 12 and [0, 65535] for 16",
            )
        if self.format != "keep":
            reject(
                "format",
                f"{self.format}, but with channels = {self.channels} no value may change; use keep",
            )
        return self

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if self.max_side is not None and self.min_side is not None:
            reject(
                "min_side",
                f"{self.min_side}, but max_side is also set, and an image can be shrunk to only "
                f"one of them",
            )
        return self


class FilterSection(Section):
    min_side: Side = 1
    """Skip images whose shorter side in the source has fewer pixels."""
    max_aspect: Annotated[float, Field(ge=1.0)] | None = None
    """Skip images whose longer side exceeds the shorter side times this."""
    duplicates: Literal["auto", "keep", "exact", "near"] = "auto"
    """exact skips files with the same bytes as an earlier one (sha256), near also pictures that
    look the same (perceptual hash), both over all splits; auto means keep for labelled sources,
    whose protocols count every image, and exact for others."""
    near_distance: Annotated[int, Field(ge=0, le=12)] = 4
    """Number of bits, of 64, in which the perceptual hashes of two pictures that look the same may
    differ."""


class PrepareRecipe(Section):
    """Makes shards from images of any layout: folders, archives, shards, VOC, COCO, YOLO, lists."""

    stage: Literal["prepare"] = "prepare"
    description: str = ""
    """One line for `dupr recipe list`."""
    source: SourceSection = SourceSection()
    shard: ShardSection = ShardSection()
    split: SplitSection = SplitSection()
    image: ImageSection = ImageSection()
    filter: FilterSection = FilterSection()
    exclude: dict[str, list[str]] = {}
    """Sets whose images must not be in the shards, such as the test set of a later evaluation: the
    address of each, and a list of its splits, [] for those that source.splits takes by default.
    Copies of such images, by their bytes or by their look (perceptual hash), are skipped."""
    seed: Seed = 0
    """Seed of the shuffle."""

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        if "" in self.exclude:
            reject("exclude", "given an empty address; name a folder, file or address")
        return self
