"""The part of a transfer protocol that only semantic segmentation has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dupr_cli.recipe.base import ImageSide, Section, reject

Positive = Annotated[int, Field(ge=1)]


class SemanticSection(Section):
    """The head of the FCN, its input and its test. Defaults: MoCo's protocol for VOC."""

    output_stride: Literal[16, 32] = 16
    """Pixels per cell of res5. 16: res5 is dilated by 2 in place of its stride; a backbone that
    cannot be dilated keeps 32, as a note in the results says."""
    channels: Positive = 256
    """Channels of the head's convolutions."""
    convolutions: Positive = 2
    """3 x 3 convolutions before the classifier."""
    dilation: Positive = 6
    """Dilation of these convolutions."""
    short_side: ImageSide | None = None
    """Short side of all images, pixels; by default each image has its own size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor of that size in training; a factor is drawn for every image."""
    crop: ImageSide = 513
    """Side of the square that is cut from the scaled image in training, pixels. What lies outside
    the image is not labelled."""
    window: ImageSide | None = None
    """Test on windows of this side, pixels, that overlap by a third, and take the mean of their
    outputs; by default on whole images."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> SemanticSection:
        if not 0 < self.scale[0] <= self.scale[1]:
            reject("scale", f"{list(self.scale)}, but it must be [smallest, largest], above 0")
        return self
