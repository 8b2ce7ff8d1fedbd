"""The base of all recipes: strict sections, names of feature levels, shared value types."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Level = Literal["res2", "res3", "res4", "res5"]
LEVELS: tuple[Level, ...] = ("res2", "res3", "res4", "res5")

# Distance of neighbouring cells of a ResNet feature map, in image pixels.
LEVEL_STRIDES: dict[Level, int] = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"
]
# Prefix of a network's name: any network of timm's that returns maps of such strides.
TIMM = "timm:"
# Prefix of weights whose tensors are shuffled, a control that keeps scale and loses structure.
PERMUTED = "permuted:"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Section(BaseModel):
    """A part of a recipe: it refuses unknown keys, and its values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def reject(key: str, message: str) -> NoReturn:
    """Fail a cross-field check at the recipe key `key`, relative to the section.

    The error carries the key, so that the message can name the line where it was set. `message`
    completes the sentence "KEY is ...".
    """
    raise PydanticCustomError("dupr_check", "{message}", {"message": message, "key": key})


def check_backbone(name: str) -> None:
    """Reject a `backbone` that no family has by its name; whether timm has it is seen later."""
    names = get_args(Backbone)
    if not name.startswith(TIMM) and name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Use {', '.join(names)} or timm:NAME"
        reject("backbone", f"{name}, which is not a backbone. {hint}")
