"""The base of all recipes: strict sections, names of feature levels, shared value types."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from dupr_cli.parsing import read_json
from dupr_cli.plugins import BACKBONES, is_plugin, plugin_names

Level = Literal["res2", "res3", "res4", "res5"]
LEVELS: tuple[Level, ...] = ("res2", "res3", "res4", "res5")

# Distance of neighbouring cells of a ResNet feature map, in image pixels.
LEVEL_STRIDES: dict[Level, int] = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"
]
# Prefixes of a network's name: any network of the library that returns maps of such strides.
TIMM = "timm:"
TRANSFORMERS = "transformers:"
# Prefix of weights whose tensors are shuffled, a control that keeps scale and loses structure.
PERMUTED = "permuted:"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Pixels. A square of the limit takes 0.8 GB as floats; what is far above fits no machine.
ImageSide = Annotated[int, Field(ge=1, le=8192)]

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
    """Fail a check at the recipe key `key`, relative to what is checked; itself if empty.

    The error carries the key, so that the message can name the line where it was set. `message`
    completes the sentence "KEY is ...".
    """
    raise PydanticCustomError("dupr_check", "{message}", {"message": message, "key": key})


def expects(words: str) -> WrapValidator:
    """Metadata of a value's type: what a wrong value gets instead of a message for each kind of
    value that would do. words: complete the sentence "it should be ..."."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError(
                "dupr_expected", "it should be {words}", {"words": words}
            ) from None

    return WrapValidator(check)


# What a configuration says beside the shape of the network.
_NOT_SHAPE = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "out_features", "out_indices",
    "stage_names", "id2label", "label2id", "_name_or_path",
}  # fmt: skip


def _configured(path: Path) -> str:
    """`transformers:JSON` of a configuration file, or of the backbone within a detector's."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        reject("", f"{TRANSFORMERS}{path}, and {file} cannot be read as JSON: {error}")
    if isinstance(config, dict):
        config = config.get("backbone_config") or config
    if not isinstance(config, dict) or "model_type" not in config:
        reject("", f"{TRANSFORMERS}{path}, and {file} has no model_type")
    shape = {key: value for key, value in config.items() if key not in _NOT_SHAPE}
    return TRANSFORMERS + json.dumps(shape, sort_keys=True, separators=(",", ":"))


def _named_backbone(name: str) -> str:
    """The name of a network, with a configuration in place of the path of its file.

    Rejects a name that no family has; whether the library has it is seen later.
    """
    names = get_args(Backbone)
    family, separator, rest = name.partition(":")
    if separator and is_plugin(BACKBONES, family):
        is_path = not rest.startswith("{") and ("/" in rest or rest.endswith(".json"))
        return _configured(Path(rest)) if is_path and name.startswith(TRANSFORMERS) else name
    if name not in names:
        near = get_close_matches(name, names, 1)
        families = ", ".join(f"{family}:NAME" for family in plugin_names(BACKBONES))
        hint = f"Did you mean {near[0]}?" if near else f"Use {', '.join(names)}, {families}"
        reject("", f"{name}, which is not a backbone. {hint}")
    return name


def _named_or_auto(name: str) -> str:
    return name if name == "auto" else _named_backbone(name)


BackboneName = Annotated[str, AfterValidator(_named_backbone)]
BackboneOrAuto = Annotated[str, AfterValidator(_named_or_auto)]
