"""The documentation site: it builds without a warning, and its reference lacks nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dupr_cli.recipe import RECIPE_MODELS, recipe_schema, shipped_recipes
from tests.support.command_line import COMMANDS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / ".mkdocs.yml"


def _reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/site/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES: dict[str, str] = _reference().pages()


def _keys(schema: Mapping[str, Any], part: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in part["properties"].items():
        yield f"{prefix}{name}"
        section = schema.get("$defs", {}).get(value.get("$ref", "").rpartition("/")[2], {})
        if "properties" in section:
            yield from _keys(schema, section, f"{prefix}{name}.")


def test_every_command_and_option_is_in_the_reference() -> None:
    page = PAGES["reference/commands.md"]
    for words, command in COMMANDS.items():
        _, found, rest = page.partition(f"## `{' '.join(('dupr', *words))}`\n")
        assert found, words
        section = rest.partition("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in section, (words, parameter.opts)


@pytest.mark.parametrize("stage", RECIPE_MODELS)
def test_every_recipe_key_is_in_the_reference(stage: str) -> None:
    page = PAGES["reference/recipe-keys.md"]
    section = page.partition(f"## dupr {stage}\n")[2].partition("\n## ")[0]
    schema = recipe_schema(stage)
    keys = list(_keys(schema, schema))
    assert len(keys) > 3
    for key in keys:
        assert f"| `{key}` |" in section, key
    for name in shipped_recipes(stage):
        assert f"### `{name}`" in PAGES["reference/shipped-recipes.md"]


def test_every_page_is_in_the_navigation() -> None:
    text = CONFIG.read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    for page in [*pages, *PAGES]:
        assert page in text, page
    assert yaml.safe_load(text)["site_name"] == "dupr"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", CONFIG,
         "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "reference" / "commands" / "index.html").is_file()
