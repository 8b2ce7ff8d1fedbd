"""Checks the arguments of `run` and `plan`, in the same way for all stages.

A recipe is a validated model, the name of a shipped recipe or the path of a file; `overrides` are
applied to it. Paths and addresses are strings or `pathlib.Path`. Anything else is a mistake of the
calling program: before any work, a TypeError says what is accepted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dupr_cli.recipe.load import Override, R, apply_overrides, load_recipe

# {"train.steps": 3}, or what --set takes: ["train.steps=3"]; the command line adds Overrides that
# name the option they come from.
Overrides = Mapping[str, object] | Sequence[str | Override] | Sequence[str]


def resolve_recipe(model: type[R], recipe: R | str | Path, overrides: Overrides = ()) -> R:
    """The recipe to run. Raises RecipeError like `load_recipe`, TypeError for other types."""
    options = as_overrides(overrides)
    if isinstance(recipe, model):
        return apply_overrides(recipe, options) if options else recipe
    if isinstance(recipe, str | Path):
        return load_recipe(model, str(recipe), options)
    raise TypeError(
        f"recipe: give {_a(model.__name__)}, the name of a shipped recipe or the path of a recipe "
        f"file, not {_a(type(recipe).__name__)}."
    )


def as_overrides(overrides: Overrides) -> list[Override]:
    """Each key that is set. Raises RecipeError for a string that is no key=value, and TypeError."""
    if isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides):
        return [
            Override(key, os.fspath(value) if isinstance(value, os.PathLike) else value)
            for key, value in overrides.items()
        ]
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str | bytes)
    if listed and all(isinstance(option, str | Override) for option in overrides):
        return [
            option if isinstance(option, Override) else Override.parse(str(option))
            for option in overrides
        ]
    raise TypeError(
        f'overrides: give a mapping such as {{"train.steps": 3}} or a list of strings such as '
        f'["train.steps=3"], not {_shortened(overrides)}.'
    )


def as_path(value: str | Path, name: str) -> Path:
    """`value` as a path. name: of the argument, for the message. Raises TypeError."""
    return Path(as_address(value, name))


def as_address(value: str | Path, name: str) -> str:
    """A path, or an address such as https://... or hf://..., as a string; see `as_path`."""
    if isinstance(value, str | Path):
        return str(value)
    raise TypeError(f"{name}: give a string or a pathlib.Path, not {_shortened(value)}.")


def as_addresses(values: Sequence[str | Path] | str | Path, name: str) -> list[str]:
    """One or several addresses as strings; see `as_path`."""
    if isinstance(values, str | Path):
        return [str(values)]
    if isinstance(values, Sequence):
        return [as_address(value, f"{name}[{number}]") for number, value in enumerate(values)]
    raise TypeError(
        f"{name}: give a string, a pathlib.Path or a list of them, not {_shortened(values)}."
    )


def _shortened(value: object) -> str:
    text = repr(value)
    return f"{_a(type(value).__name__)} ({text})" if len(text) <= 60 else _a(type(value).__name__)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"
