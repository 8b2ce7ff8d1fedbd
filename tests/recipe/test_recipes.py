"""Recipes: what is valid, what is not, and what the message says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.recipe import (
    RECIPE_MODELS,
    EvaluateRecipe,
    PrepareRecipe,
    PretrainRecipe,
    RecipeError,
    load_recipe,
    recipe_digest,
    recipe_schema,
    recipe_value,
    recipe_yaml,
    shipped_recipes,
)
from dupr_cli.recipe.load import recipe_stage
from dupr_cli.recipe.study import StudyRecipe

SHIPPED = [(path.parent.name, name) for name, path in shipped_recipes().items()]


@pytest.mark.parametrize(("stage", "name"), SHIPPED)
def test_shipped_recipe_is_valid_and_opens_with_its_command(stage: str, name: str) -> None:
    load_recipe(RECIPE_MODELS[stage], name)
    lines = shipped_recipes()[name].read_text().splitlines()
    assert all(line.startswith("#") for line in lines[:3])
    command = {"probe": "evaluate"}.get(stage, stage)
    assert any(line.startswith(f"#   dupr {command}") for line in lines[:8])
    assert any(line.startswith("# Source") for line in lines[:8])
    assert any(line.startswith("# Cost") for line in lines[:8])


@pytest.mark.parametrize(("stage", "name"), SHIPPED)
def test_resolved_recipe_reads_back_as_itself(stage: str, name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE_MODELS[stage], name)
    file = tmp_path / "resolved.yaml"
    file.write_text(recipe_yaml(recipe))
    assert load_recipe(RECIPE_MODELS[stage], str(file)) == recipe
    assert recipe_stage(str(file)) == stage


def test_recipe_names_are_unique_over_the_stages() -> None:
    files = [p for stage in RECIPE_MODELS for p in shipped_recipes(stage).values()]
    names = [p.stem for p in files if p.stem != "default"]
    assert len(names) == len(set(names))


def problem(text: str, tmp_path: Path, *overrides: str) -> str:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(PretrainRecipe, str(file), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "extends: dupr-r18-cpu-smoke\nmethod:\n  views: {sise: 64}\n",
            "my.yaml, line 3: method.views.sise is not a key of this recipe. "
            "Did you mean method.views.size?",
        ),
        (
            "extends: dupr-r18-cpu-smoke\nlr: 0.1\n",
            "my.yaml, line 2: lr is not a key of this recipe. Did you mean optimizer.lr?",
        ),
        (
            "extends: dupr-r18-cpu-smoke\n\noptimizer:\n  lr: -1\n",
            "my.yaml, line 4: optimizer.lr is -1, but it should be greater than 0.",
        ),
        (
            "extends: dupr-r18-cpu-smoke\nmodel: {backbone: resnet19}\n",
            "Did you mean resnet18?",
        ),
        (
            "extends: dupr-r18-cpu-smoke\nmethod: {patch: {weights: {res6: 1}}}\n",
            "method.patch.weights.res6 is not a key here; use one of "
            "'res2', 'res3', 'res4' or 'res5'. Did you mean res5?",
        ),
        (
            "extends: dupr-r50-in1k-200ep\nmethod:\n  patch:\n    bins: {res4: 28, res5: 7}\n",
            "my.yaml, line 4: method.patch.bins.res4 is 28, but a view of 224 pixels has 14 x 14 "
            "cells at res4 (stride 16), and the smallest shared region 3.5. Use at most 14",
        ),
        (
            "extends: dupr-r18-cpu-smoke\nmethod: {queue_length: 32}\n",
            "method.queue_length is 32, less than the 64 keys that enter in one step",
        ),
        (
            "extends: dupr-r18-cpu-smoke\nmethod: {batch_norm: {groups: 64}}\n",
            "leaves one image per group",
        ),
        ("extends: dupr-r18-cpu-smoke\ntrain: {epochs: 3}\n", "both are given"),
        ("stage: pretrain\n", "train is missing"),
        ("stage: prepare\n", "stage is 'prepare', but a recipe for dupr pretrain is needed"),
        ("extends: nowhere\n", "my.yaml, line 1: extends: nowhere is neither a file nor a shipped"),
        ("extends: my.yaml\n", "extend one another in a circle: my.yaml extends my.yaml"),
        ("seed: 1\nseed: 2\n", "my.yaml, line 2: seed is given twice, first in line 1."),
        ("seed: [1\n", "not valid YAML"),
        ("- 1\n", "my.yaml, line 1: a recipe is a mapping"),
        (
            "extends: dupr-r18-cpu-smoke\nmethod: {views: {scale: [1.0, 0.2]}}\n",
            "method.views.scale is [1.0, 0.2], but it must be [smallest, largest]",
        ),
    ],
)
def test_wrong_recipe_gets_place_value_expectation_and_way_out(
    text: str, expected: str, tmp_path: Path
) -> None:
    assert expected in problem(text, tmp_path)


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (
            EvaluateRecipe,
            "extends: voc-tiny\ndata: {labels: 20x}\n",
            'line 2: data.labels is "20x", but it should be a number of images, a share such as '
            "10%, all, the path of a labels.json, or a list of two or more numbers and shares "
            "such as 50,100,all.",
        ),
        (
            PrepareRecipe,
            "split:\n  name: a b\n",
            'line 2: split.name is "a b", but it should be letters, digits and underscores.',
        ),
        (
            StudyRecipe,
            "extends: small-cpu\nmethods:\n  a/b: {recipe: densecl-like}\n",
            'line 3: methods.a/b has the name "a/b", but it should be letters, digits and any of '
            ". + - _, because a folder is named after it.",
        ),
    ],
)
def test_a_value_of_several_kinds_gets_one_message(
    model: type[PrepareRecipe] | type[EvaluateRecipe] | type[StudyRecipe],
    text: str,
    expected: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(model, str(file))
    assert str(caught.value) == f"{file}, {expected}"


def test_every_problem_is_listed(tmp_path: Path) -> None:
    text = "extends: dupr-r18-cpu-smoke\nsede: 1\noptimizer: {lr: x}\ntrain: {steps: 0}\n"
    message = problem(text, tmp_path)
    assert [line.split(": ")[0] for line in sorted(message.splitlines())] == [
        "my.yaml, line 2",
        "my.yaml, line 3",
        "my.yaml, line 4",
    ]


def test_override_is_named_as_the_place(tmp_path: Path) -> None:
    message = problem("extends: dupr-r18-cpu-smoke\n", tmp_path, "data.batch_sise=3")
    assert message.startswith("--set data.batch_sise=3: data.batch_sise is not a key")
    assert message.endswith("Did you mean data.batch_size?")


def test_level_maps_replace_and_sections_merge(tmp_path: Path) -> None:
    file = tmp_path / "only-res5.yaml"
    file.write_text(
        "extends: dupr-r50-in1k-200ep\n"
        "method:\n  image: {weights: {res5: 1.0}}\n  patch: {weights: {}}\n"
    )
    recipe = load_recipe(PretrainRecipe, str(file))
    assert recipe.method.image.weights == {"res5": 1.0}
    assert recipe.method.patch.weights == {}
    assert recipe.method.image.temperature == 0.2
    assert recipe.method.queue_length == 65_536


def test_override_reaches_into_a_map_and_keeps_the_rest() -> None:
    recipe = load_recipe(PretrainRecipe, "dupr-r50-in1k-200ep", ["method.patch.weights.res4=0.5"])
    assert recipe.method.patch.weights == {"res4": 0.5, "res5": 1.0}
    evaluation = load_recipe(EvaluateRecipe, None, ["train.lr=1e-3"])
    assert evaluation.train.lr == 1e-3


def test_extends_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("stage: prepare\nshard: {max_samples: 7}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nimage: {quality: 80}\n")
    recipe = load_recipe(PrepareRecipe, str(tmp_path / "child.yaml"))
    assert (recipe.shard.max_samples, recipe.image.quality) == (7, 80)


@given(st.floats(1e-12, 1e12))
def test_numbers_in_any_notation_are_numbers(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:.0e}"):
        recipe = load_recipe(EvaluateRecipe, None, [f"train.lr={text}"])
        assert recipe.train.lr == float(text)


def test_digest_ignores_order_and_description(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("stage: prepare\nshard: {max_samples: 5}\nimage: {quality: 90}\n")
    second.write_text(
        "description: x\nimage: {quality: 90}\nshard: {max_samples: 5}\nstage: prepare\n"
    )
    digests = [recipe_digest(load_recipe(PrepareRecipe, str(f))) for f in (first, second)]
    assert digests[0] == digests[1]
    assert recipe_digest(load_recipe(PrepareRecipe, None)) != digests[0]


@pytest.mark.parametrize("stage", list(RECIPE_MODELS))
def test_schema_knows_every_key_of_the_shipped_recipes(stage: str) -> None:
    schema = json.loads(json.dumps(recipe_schema(stage)))
    for path in shipped_recipes(stage).values():
        _check_keys(yaml.safe_load(path.read_text()), schema, schema)


def _check_keys(value: dict[str, object], node: dict[str, Any], root: dict[str, Any]) -> None:
    while "$ref" in node:
        node = root["$defs"][str(node["$ref"]).rpartition("/")[2]]
    properties = node.get("properties")
    if not isinstance(properties, dict):
        return
    assert node["additionalProperties"] is False
    for key, inner in value.items():
        assert key in properties
        if isinstance(inner, dict):
            _check_keys(inner, properties[key], root)


def test_values_are_shown_as_people_write_them() -> None:
    shown = [recipe_value(value) for value in (None, True, 1, "a", [1, 2])]
    assert shown == ["null", "true", "1", "a", "[1, 2]"]
