"""Recipes that were made to do harm, or that name files that are no recipes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dupr_cli.recipe import PrepareRecipe, load_recipe
from dupr_cli.recipe.load import RecipeError

_SECRET = "hunter2"


def problem(folder: Path, text: str, *overrides: str) -> str:
    file = folder / "my.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(PrepareRecipe, str(file), overrides)
    return str(caught.value)


def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdef", "bcdefg", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    start = time.monotonic()
    assert "more than 100000 values" in problem(tmp_path, "\n".join(lines))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: &a [*a]", "the alias *a is inside the value"),
        ("seed: " + "[" * 5000, "nested deeper than 100 levels"),
        ("seed: " + "1" * 5000, "line 1: a value cannot be read as YAML's type int"),
        ("image:\n  min_side: !!timestamp x", "line 2: a value cannot be read as YAML's type time"),
        ("seed: !!binary aGk=", "a value has the type bytes"),
        ("seed: 2024-13-45", 'seed is "2024-13-45", but it should be a valid integer'),
        ("description: " + "x" * 300_000, "larger than 0.25 MiB"),
    ],
)
def test_a_value_that_no_key_takes_is_one_message(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_an_override_that_no_key_takes_is_one_message(tmp_path: Path) -> None:
    assert "--set seed=!!int x: the value cannot be read" in problem(tmp_path, "", "seed=!!int x")
    assert "nested deeper" in problem(tmp_path, "", "seed=" + "[" * 5000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("passwd", f"root:x:0:0:{_SECRET}:/root:/bin/bash\n"),
        ("key.pem", f"-----BEGIN {_SECRET}-----\n{_SECRET}: @{_SECRET}\n"),
        ("secret.yaml", f"apiVersion: v1\nkind: Secret\n{_SECRET}: 1\ndata: {{{_SECRET}: 1}}\n"),
        ("broken.yaml", f"user: '{_SECRET}\n"),
    ],
)
def test_a_file_that_is_no_recipe_is_not_quoted(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    message = problem(tmp_path, f"extends: {name}\n")
    assert "the file that is extended is not a recipe" in message
    assert _SECRET not in message


def test_a_mistyped_key_of_an_extended_recipe_is_still_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("stage: prepare\nsede: 5\n")
    assert "base.yaml, line 2: sede is not a key of this recipe. Did you mean seed?" in problem(
        tmp_path, "extends: base.yaml\n"
    )
