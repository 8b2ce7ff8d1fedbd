"""Recipes: the settings of a stage as YAML, checked by pydantic before anything starts.

`load_recipe` reads a file or a shipped recipe by name, follows `extends`, applies `--set` overrides
and returns the validated model. A mistake becomes a `RecipeError` that names file, line, key, the
value found and the value expected.
"""

from dupr_cli.recipe.base import Level, Section
from dupr_cli.recipe.evaluate import EvaluateRecipe
from dupr_cli.recipe.export import ExportRecipe
from dupr_cli.recipe.given import Overrides, as_address, as_addresses, as_path, resolve_recipe
from dupr_cli.recipe.load import (
    RECIPE_MODELS,
    Recipe,
    RecipeError,
    find_recipe,
    load_recipe,
    recipe_digest,
    recipe_keys,
    recipe_schema,
    recipe_value,
    recipe_yaml,
    shipped_recipes,
)
from dupr_cli.recipe.prepare import PrepareRecipe
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.recipe.probe import ProbeRecipe
from dupr_cli.recipe.study import StudyRecipe

__all__ = [
    "RECIPE_MODELS",
    "EvaluateRecipe",
    "ExportRecipe",
    "Level",
    "Overrides",
    "PrepareRecipe",
    "PretrainRecipe",
    "ProbeRecipe",
    "Recipe",
    "RecipeError",
    "Section",
    "StudyRecipe",
    "as_address",
    "as_addresses",
    "as_path",
    "find_recipe",
    "load_recipe",
    "recipe_digest",
    "recipe_keys",
    "recipe_schema",
    "recipe_value",
    "recipe_yaml",
    "resolve_recipe",
    "shipped_recipes",
]
