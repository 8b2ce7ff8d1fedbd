"""`dupr recipe`: lists, shows, copies and validates recipes, and prints their JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dupr_cli.cli.command import Set, command
from dupr_cli.cli.help_text import Group
from dupr_cli.progress import Reporter

if TYPE_CHECKING:
    from dupr_cli.recipe import Section

Stage = Literal["prepare", "pretrain", "export", "evaluate", "probe", "study"]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich")

    @group.callback()
    def recipe() -> None:
        """List, show, copy and check recipes."""

    command(group, "list", show_list)(list_recipes)
    command(group, "show", show_recipe)(show)
    command(group, "copy", show_text)(copy)
    command(group, "validate", show_text)(validate)
    command(group, "schema", show_schema)(schema)
    app.add_typer(group, name="recipe")


def list_recipes(
    stage: Annotated[
        Stage | None, typer.Argument(metavar="[STAGE]", help="Only the recipes of this stage.")
    ] = None,
) -> list[dict[str, str]]:
    """List the recipes that ship with dupr.

    [bold]Examples[/]

      dupr recipe list

      dupr recipe list evaluate
    """
    from dupr_cli.recipe import RECIPE_MODELS, shipped_recipes
    from dupr_cli.recipe.load import recipe_description

    return [
        {"stage": kind, "name": name, "description": recipe_description(path, kind)}
        for kind in RECIPE_MODELS
        if stage in (None, kind)
        for name, path in shipped_recipes(kind).items()
    ]


def show_list(recipes: list[dict[str, str]]) -> None:
    from dupr_cli.cli.console import print_facts

    print_facts(
        [(f"{r['stage']:<9} {r['name']}", r["description"]) for r in recipes],
        title="stage     recipe",
    )


def _stage_of(name: str) -> str:
    """The stage of a recipe, from its `stage` key or that of the recipe it extends."""
    from dupr_cli.recipe.load import recipe_stage

    return recipe_stage(name)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or a file.")],
    set_: Set = None,
    source: Annotated[
        bool, typer.Option("--source", help="Print the file itself, with its comments.")
    ] = False,
) -> Section | str:
    """Print a recipe as it will run, with every inherited and overridden key.

    [bold]Example[/]

      dupr recipe show dupr-r18-cpu-smoke --set optimizer.lr=0.1
    """
    from dupr_cli.recipe import RECIPE_MODELS, find_recipe, load_recipe

    if source:
        return find_recipe(name).read_text(encoding="utf-8")
    return load_recipe(RECIPE_MODELS[_stage_of(name)], name, set_ or [])


def show_recipe(recipe: Section | str) -> None:
    from dupr_cli.recipe import recipe_yaml

    show_text(recipe if isinstance(recipe, str) else recipe_yaml(recipe))


def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe or a file.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new recipe file.")],
) -> str:
    """Copy a recipe into a new file, with its comments, as a start for your own.

    [bold]Example[/]

      dupr recipe copy voc-tiny mine.yaml
    """
    from dupr_cli.artifacts.files import write_text
    from dupr_cli.errors import UsageError
    from dupr_cli.recipe import find_recipe

    source = find_recipe(name)
    if file.is_dir():
        raise UsageError(f"{file} is a directory; give the name of the new recipe file.")
    if file.exists() or file.is_symlink():
        raise UsageError(f"{file} exists; give another name, so that nothing is lost.")
    write_text(file, source.read_text(encoding="utf-8"))
    return f"{file} is a copy of {name}; its keys: dupr recipe show {file}"


def validate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe file.")],
    set_: Set = None,
    *,
    reporter: Reporter,
) -> str:
    """Check a recipe; if it is wrong, print every problem with its line and exit with code 2.

    A valid recipe that may fail to learn causes a warning with a proposal.

    [bold]Example[/]

      dupr recipe validate mine.yaml
    """
    from dupr_cli.recipe import RECIPE_MODELS, PretrainRecipe, load_recipe

    stage = _stage_of(file)
    recipe = load_recipe(RECIPE_MODELS[stage], file, set_ or [])
    if isinstance(recipe, PretrainRecipe):
        from dupr_cli.pretrain.recipe_checks import science_warnings

        for warning in science_warnings(recipe, None, recipe.train.steps):
            reporter.warning(warning)
    return f"{file} is a valid recipe for dupr {stage}"


def show_text(text: str) -> None:
    from dupr_cli.cli.console import print_text

    print_text(text)


def schema(
    stage: Annotated[
        Stage,
        typer.Argument(
            metavar="STAGE", help="prepare, pretrain, export, evaluate, probe or study."
        ),
    ],
) -> dict[str, object]:
    """Print the JSON Schema of a stage's recipes, with which editors complete and check YAML.

    [bold]Example[/]

      dupr recipe schema pretrain > pretrain.schema.json

    Then put this as the first line of a recipe:
    # yaml-language-server: $schema=pretrain.schema.json
    """
    from dupr_cli.recipe import recipe_schema

    return recipe_schema(stage)


def show_schema(schema: dict[str, object]) -> None:
    from dupr_cli.cli.console import print_json

    print_json(schema)
