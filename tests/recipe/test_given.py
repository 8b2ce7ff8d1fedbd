"""What `run` and `plan` of every stage accept, and what they say of anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli import evaluate, export, prepare, pretrain, probe
from dupr_cli.recipe import (
    EvaluateRecipe,
    ExportRecipe,
    PrepareRecipe,
    PretrainRecipe,
    ProbeRecipe,
    RecipeError,
    Section,
    as_address,
    as_addresses,
    find_recipe,
    load_recipe,
    resolve_recipe,
)
from tests.support.class_images import class_folders
from tests.support.labelled_scenes import make_tree
from tests.support.recipes import TINY
from tests.support.weights import random_weights

# A stage, its recipe's model and name, an override, what lies between the recipe and `out`.
Case = tuple[ModuleType, type[Section], str, str, object, list[Path | str]]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("given")
    weights = random_weights(root / "w.safetensors")
    tree, classes = make_tree(root / "tree"), class_folders(root / "classes", 4, 2)
    return {
        "prepare": (prepare, PrepareRecipe, "default", "shard.max_samples", 7, [tiny_shards]),
        "pretrain": (
            pretrain, PretrainRecipe, "dupr-r18-cpu-smoke", "train.steps", 7, [tiny_shards],
        ),
        "export": (export, ExportRecipe, "default", "encoder", "key", [weights]),
        "evaluate": (evaluate, EvaluateRecipe, "voc-tiny", "train.iterations", 777, ["none", tree]),
        "probe": (probe, ProbeRecipe, "knn", "data.limit", 3, ["none", classes]),
    }  # fmt: skip


STAGES = ("prepare", "pretrain", "export", "evaluate", "probe")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", ["model", "name", "path", "str path"])
@pytest.mark.parametrize("place", [Path, str])
def test_recipes_and_paths_of_any_form_give_the_same_plan(
    cases: dict[str, Case], stage: str, form: str, place: Callable[[object], Path | str],
    tmp_path: Path,
) -> None:  # fmt: skip
    module, model, name, _, _, inputs = cases[stage]
    recipe = {
        "model": load_recipe(model, name),
        "name": name,
        "path": find_recipe(name, stage),
        "str path": str(find_recipe(name, stage)),
    }[form]
    expected = module.plan(load_recipe(model, name), *inputs, tmp_path / "out")
    assert module.plan(recipe, *map(place, inputs), place(tmp_path / "out")) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_overrides_of_any_form_give_the_same_recipe(cases: dict[str, Case], stage: str) -> None:
    _, model, name, key, value, _ = cases[stage]
    expected = load_recipe(model, name, [f"{key}={value}"])
    assert expected != load_recipe(model, name)
    for recipe in (name, load_recipe(model, name)):
        for overrides in ({key: value}, [f"{key}={value}"], (f"{key}={value}",)):
            assert resolve_recipe(model, recipe, overrides) == expected


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("recipe", {"recipe": {"train": 1}}, r"recipe: give an? \w+Recipe, the name of a shipped "
     r"recipe or the path of a recipe file, not a dict\."),
    ("recipe", {"recipe": None}, "not a NoneType"),
    ("overrides", {"overrides": 3}, r"overrides: give a mapping .*, not an int \(3\)"),
    ("overrides", {"overrides": "a=b"}, r"not a str \('a=b'\)"),
    ("overrides", {"overrides": {1: 2}}, r"not a dict \(\{1: 2\}\)"),
    ("overrides", {"overrides": [1]}, r"not a list \(\[1\]\)"),
    ("out", {"out": 3}, r"out: give a string or a pathlib\.Path, not an int \(3\)"),
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", ["plan", "run"])
@pytest.mark.parametrize(("argument", "changed", "message"), WRONG)
def test_anything_else_is_a_type_error_that_says_what_is_accepted(
    cases: dict[str, Case], stage: str, call: str, argument: str, changed: dict[str, Any],
    message: str, tmp_path: Path,
) -> None:  # fmt: skip
    module, _, name, _, _, inputs = cases[stage]
    given = {"recipe": name, "out": tmp_path / "out", **changed}
    recipe, out = given.pop("recipe"), given.pop("out")
    with pytest.raises(TypeError, match=message):
        getattr(module, call)(recipe, *inputs, out, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_data_of_another_type_is_a_type_error(
    cases: dict[str, Case], stage: str, tmp_path: Path
) -> None:
    module, _, name, _, _, inputs = cases[stage]
    with pytest.raises(TypeError, match=r": give a string or a pathlib\.Path, not an int"):
        module.plan(name, *inputs[:-1], 5, tmp_path / "out")


def test_recipe_of_another_stage_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not an ExportRecipe"):
        resolve_recipe(PretrainRecipe, load_recipe(ExportRecipe, "default"))


def test_wrong_value_of_a_mapping_is_named_with_its_key() -> None:
    with pytest.raises(RecipeError, match=r"overrides, train\.steps: train\.steps is \"many\""):
        resolve_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", {"train.steps": "many"})


def test_value_of_a_mapping_is_no_yaml() -> None:
    """As a string it would have to be written 1.0e-05."""
    made = resolve_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", {"optimizer.lr": 1e-05})
    assert made.optimizer.lr == 1e-05


def test_path_of_a_mapping_becomes_a_string(tmp_path: Path) -> None:
    made = resolve_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", {"model.init": tmp_path / "w"})
    assert made.model.init == str(tmp_path / "w")


def test_override_of_a_model_keeps_everything_else() -> None:
    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", TINY)
    changed = resolve_recipe(PretrainRecipe, recipe, {"method.patch.weights.res4": 0.5})
    kept = changed.model_dump()
    assert kept["method"]["patch"]["weights"].pop("res4") == 0.5
    expected = recipe.model_dump()
    expected["method"]["patch"]["weights"].pop("res4")
    assert kept == expected


@given(st.lists(st.text() | st.builds(Path, st.sampled_from("abc"))))
def test_addresses_become_strings_in_their_order(values: list[str | Path]) -> None:
    assert as_addresses(values, "weights") == [as_address(value, "") for value in values]


def test_one_address_is_a_list_of_one() -> None:
    assert as_addresses("none", "weights") == ["none"]


def test_a_run_takes_a_name_strings_and_a_mapping(tmp_path: Path, tiny_shards: Path) -> None:
    overrides = {**dict(option.split("=") for option in TINY), "train.steps": 2}
    values = {key: yaml.safe_load(str(value)) for key, value in overrides.items()}
    done = pretrain.run(
        "dupr-r18-cpu-smoke", str(tiny_shards), str(tmp_path / "run"), overrides=values,
        device="cpu",
    )  # fmt: skip
    assert done is not None
    assert done.steps == 2
