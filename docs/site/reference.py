"""The generated pages of the site: commands, recipe keys, the Python interface, and the tutorial.

MkDocs calls `on_files` (.mkdocs.yml names this file as a hook). The pages come from the program
and from the tutorial's notebook, so that they cannot differ from them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from dupr_cli.cli.app import app
from dupr_cli.recipe import RECIPE_MODELS, recipe_schema, shipped_recipes
from dupr_cli.recipe.load import recipe_description

# What a program may call, by the module that has it.
PYTHON = {
    "dupr_cli.prepare": ("plan", "run"),
    "dupr_cli.pretrain": ("plan", "run"),
    "dupr_cli.export": ("plan", "run", "check", "load_into"),
    "dupr_cli.evaluate": ("plan", "run", "run_labels"),
    "dupr_cli.study": ("plan", "run"),
    "dupr_cli.report": ("run",),
    "dupr_cli.measure.plan": ("propose",),
    "dupr_cli.prepare.view": ("draw_sheet",),
    "dupr_cli.inspect.network": ("open_network", "open_frozen"),
    "dupr_cli.inspect.views": ("draw_views",),
    "dupr_cli.inspect.curves": ("draw_curves",),
    "dupr_cli.inspect.matches": ("draw_matches",),
    "dupr_cli.inspect.features": ("draw_features",),
    "dupr_cli.recipe": ("load_recipe", "recipe_schema", "recipe_yaml"),
    "dupr_cli.artifacts.results": ("Results",),
    "dupr_cli.progress": ("Reporter", "SilentReporter", "LoggingReporter"),
    "dupr_cli.cli.console": ("ConsoleReporter",),
}


TUTORIAL = Path(__file__).parents[1] / "tutorial.ipynb"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; called by MkDocs."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def pages() -> dict[str, str]:
    """Markdown by its place in the site."""
    return {
        "reference/commands.md": commands(),
        "reference/recipe-keys.md": recipe_keys(),
        "reference/shipped-recipes.md": recipes(),
        "reference/python.md": python(),
        "tutorial.md": tutorial(),
    }


def commands() -> str:
    """Every command with its help, arguments and options."""
    parts = ["# Commands\n\nThe same as `dupr COMMAND --help`.\n"]
    for words, command in _walk(typer.main.get_command(app), ("dupr",)):
        name = " ".join(words)
        parts.append(f"## `{name}`\n\n{_help(command.help or '')}\n")
        rows = [row for parameter in command.params if (row := _parameter(parameter))]
        if rows:
            parts.append("| option | value | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something. `dupr prepare` is a group that also runs the stage."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name in command.list_commands(None):
        below = words if name == "run" else (*words, name)
        yield from _walk(command.commands[name], below)


def _help(text: str) -> str:
    """Help as Markdown: examples become a block of code."""
    lines = []
    for paragraph in re.sub(r"\[bold\](.*?)\[/\]", r"\1", text).split("\n\n"):
        if paragraph.startswith("  "):
            code = inspect.cleandoc(paragraph).replace(r"\[", "[")
            lines.append(f"```bash\n{code}\n```")
        elif paragraph not in ("Example", "Examples"):
            lines.append(_escaped(paragraph))
    return "\n\n".join(lines)


def _parameter(parameter: Any) -> str | None:
    text = getattr(parameter, "help", None) or ""
    if not hasattr(parameter, "opts") or getattr(parameter, "hidden", False):
        return None
    is_option = parameter.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in parameter.opts) if is_option else ""
    value = parameter.metavar or ("" if is_option else (parameter.name or "").upper())
    default = parameter.default
    if parameter.required:
        text = f"{text} **Required.**"
    elif isinstance(default, str | int | float) and not isinstance(default, bool):
        text = f"{text} Default: `{default}`."
    return f"| {names} | {_cell(f'`{value}`' if value else '')} | {_cell(text)} |"


def recipe_keys() -> str:
    """Every key of every stage's recipes, with its type, default and meaning."""
    parts = [
        "# Recipe keys\n\nThe keys of each stage with their types, defaults and meaning. `dupr "
        "recipe show NAME` prints a recipe with all of them, [Recipes](../recipes.md) says how "
        "they are given, and [Method](../method.md) where the values come from.\n"
    ]
    for stage in RECIPE_MODELS:
        schema = recipe_schema(stage)
        parts.append(f"## dupr {stage}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        parts += _rows(schema, schema, "")
        parts.append("")
    return "\n".join(parts)


def _rows(schema: Mapping[str, Any], part: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in part["properties"].items():
        key, meaning = f"{prefix}{name}", value.get("description", "")
        section = _section(schema, value)
        if section is not None:
            about = meaning or section.get("description", "")
            yield f"| `{key}` | | | {_cell(about)} |"
            yield from _rows(schema, section, f"{key}.")
        else:
            default = _value(value["default"]) if "default" in value else "none"
            kind = _type(schema, value)
            yield f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |"


def _section(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a value is, None for any other value."""
    found = schema.get("$defs", {}).get(value.get("$ref", "").rpartition("/")[2])
    return found if found is not None and "properties" in found else None


def _type(schema: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        return _type(schema, schema["$defs"][value["$ref"].rpartition("/")[2]])
    if "enum" in value:
        return " or ".join(f"`{each}`" for each in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(schema, part) for part in value["anyOf"]))
    if "prefixItems" in value:
        return "(" + ", ".join(_type(schema, part) for part in value["prefixItems"]) + ")"
    kind = value.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema, value.get('items', {}))}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {_type(schema, value['additionalProperties'])}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    limits = [
        f"{sign} {value[name]}"
        for name, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"),
            ("maximum", "≤"), ("exclusiveMaximum", "<"),
        )
        if name in value
    ]  # fmt: skip
    return " ".join([words.get(kind, kind), *limits])


def _value(value: object) -> str:
    if value in ("", None):
        return "empty" if value == "" else "null"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return f"`{text.removesuffix('...').strip()}`"


def recipes() -> str:
    """Every shipped recipe with its description and the comments that open its file."""
    parts = ["# Shipped recipes\n"]
    for stage in RECIPE_MODELS:
        parts.append(f"## dupr {stage}\n")
        for name, path in shipped_recipes(stage).items():
            comments = []
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.startswith("#"):
                    break
                comments.append(line)
            command, about = "", []
            for line in comments:
                text = line.removeprefix("#").strip()
                if line.startswith("#   "):
                    command = text
                else:
                    about.append(text)
            parts.append(f"### `{name}`\n\n{_escaped(recipe_description(path, stage))}.\n")
            parts.append(f"```bash\n{command}\n```\n\n{_escaped(' '.join(about))}\n")
    return "\n".join(parts)


def python() -> str:
    """What programs call, with signatures and docstrings."""
    parts = [
        "# Python\n\nEvery stage is a function. `recipe` is a recipe object, the name of a shipped "
        "recipe or a path; `overrides` is a mapping of keys, or what `--set` takes. Wrong input "
        "raises `dupr_cli.errors.UsageError`, a run that cannot go on `RunError`.\n"
    ]
    for module, names in PYTHON.items():
        parts.append(f"## {module}\n")
        loaded = importlib.import_module(module)
        for name in names:
            found = getattr(loaded, name)
            parts.append(f"### `{module.rpartition('.')[2]}.{name}`\n")
            parts.append(f"```python\n{name}{_signature(found)}\n```\n")
            paragraphs = (inspect.getdoc(found) or "").split("\n\n")
            parts += [f"{_escaped(' '.join(text.split()))}\n" for text in paragraphs]
    return "\n".join(parts)


def tutorial() -> str:
    """The cells of the notebook: its text as it is, its code in fences."""
    title, *cells = json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]
    link = "This page is a notebook: [download it](tutorial.ipynb) and run it.\n"
    parts = ["".join(title["source"]), link]
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def _signature(found: Any) -> str:
    """One parameter per line, as the source has them."""
    signature = inspect.signature(found)
    lines, seen_keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_keyword:
            lines.append("*")
            seen_keyword = True
        lines.append(str(parameter).replace("'", ""))
    body = ",\n    ".join(lines)
    returned = signature.return_annotation
    end = "" if returned is inspect.Signature.empty else f" -> {returned}"
    return f"(\n    {body},\n){end}"


def _escaped(text: str) -> str:
    """Text whose marks mean nothing in Markdown, but for code in backticks."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"([*_\[])", r"\\\1", parts[place]).replace("<", "&lt;")
    return "`".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
