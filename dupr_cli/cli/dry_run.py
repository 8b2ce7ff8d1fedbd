"""Prints the result of --dry-run for people: the resolved recipe and the plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dupr_cli.cli.console import print_text
from dupr_cli.outside_text import json_text, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dupr_cli.recipe import Section


def show_plan(recipe: Section, plan: DataclassInstance) -> None:
    """Print the plan as comments and the recipe as YAML, so that the output is a valid recipe."""
    from dupr_cli.recipe import recipe_yaml

    facts: dict[str, Any] = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    width = max(len(name) for name in facts)
    lines = [f"#   {name:<{width}}  {_shown(value)}" for name, value in facts.items()]
    print_text("\n".join(["# Plan (nothing is done):", *lines, recipe_yaml(recipe)]))


def _shown(value: object) -> str:
    """Text as it is, a part of a plan as it describes itself, and anything else as JSON."""
    if isinstance(value, str) or dataclasses.is_dataclass(value):
        return one_line(str(value))
    return json_text(value)
