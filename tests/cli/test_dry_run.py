"""--dry-run and `recipe show`: what is printed for people and as JSON, and that nothing is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dupr_cli.recipe import RECIPE_MODELS, load_recipe
from tests.support.class_images import class_folders
from tests.support.command_line import TINY_SET, dupr
from tests.support.labelled_scenes import make_coco, make_tree
from tests.support.weights import random_weights

SCENES = [[("red", 5, 5, 40, 40)], [("green", 10, 10, 60, 50)]]


def commands(root: Path, shards: Path) -> dict[str, list[object]]:
    """By stage and command, the smallest call of every command that has --dry-run."""
    tree = make_tree(root / "tree")
    coco = make_coco(root / "coco", {"train2017": SCENES, "val2017": SCENES})
    classes = class_folders(root / "classes", 4, 2)
    out = root / "out"
    probe = ("none", "--data", classes, "--out", out)
    return {
        "prepare": ["prepare", shards, out],
        "prepare download": ["prepare", root / "voc", out, "--download", "voc2007"],
        "pretrain": ["pretrain", "dupr-r18-cpu-smoke", "--data", shards, "--out", out, *TINY_SET],
        "evaluate voc": ["evaluate", "voc", "none", "--data", tree, "--out", out],
        "evaluate coco": ["evaluate", "coco", "none", "--data", coco, "--out", out],
        "probe knn": ["evaluate", "knn", *probe],
        "probe linear": ["evaluate", "linear", *probe],
        "probe patch-retrieval": ["evaluate", "patch-retrieval", *probe],
    }


NAMES = (
    "prepare", "prepare download", "pretrain", "evaluate voc", "evaluate coco", "probe knn",
    "probe linear", "probe patch-retrieval",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_as_json_is_one_object_with_recipe_and_plan(
    name: str, tmp_path: Path, tiny_shards: Path
) -> None:
    call = commands(tmp_path, tiny_shards)[name]
    printed: dict[str, Any] = json.loads(dupr(*call, "--dry-run", "--json").stdout)
    assert printed.keys() == {"recipe", "plan"}
    assert printed["recipe"]["stage"] == name.split()[0]
    assert printed["plan"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_the_same_recipe_as_yaml_and_as_json(
    name: str, tmp_path: Path, tiny_shards: Path
) -> None:
    call = commands(tmp_path, tiny_shards)[name]
    as_text = dupr(*call, "--dry-run").stdout
    as_json = json.loads(dupr(*call, "--dry-run", "--json").stdout)["recipe"]
    model = RECIPE_MODELS[name.split()[0]]
    assert model.model_validate(yaml.safe_load(as_text)) == model.model_validate(as_json)


def test_dry_run_of_an_export_is_one_object(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    call = ["export", weights, "--to", "timm", "--out", tmp_path / "out", "--dry-run", "--json"]
    assert json.loads(dupr(*call).stdout).keys() == {"recipe", "plan"}
    assert not (tmp_path / "out").exists()


def test_dry_run_of_a_push_writes_nothing(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "w.safetensors")
    call = ["export", weights, "--to", "timm", "--out", tmp_path / "out", "--push-to-hub", "me/m"]
    printed = json.loads(dupr(*call, "--dry-run", "--json").stdout)
    assert printed.keys() == {"recipe", "plan"}
    assert printed["plan"]["push_to_hub"] == "me/m"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "name"),
    [("pretrain", "dupr-r18-cpu-smoke"), ("evaluate", "voc-tiny"), ("export", "default")],
)
def test_recipe_show_as_json_is_the_recipe(stage: str, name: str) -> None:
    # `default` is a recipe of two stages; the file says which.
    address = f"recipes/{stage}/{name}.yaml" if name == "default" else name
    if name == "default":
        address = str(Path(__file__).parents[2] / address)
    printed = json.loads(dupr("recipe", "show", address, "--json").stdout)
    model = RECIPE_MODELS[stage]
    assert model.model_validate(printed) == load_recipe(model, address)


def test_recipe_show_prints_yaml_for_people() -> None:
    printed = dupr("recipe", "show", "voc-tiny").stdout
    assert yaml.safe_load(printed) == json.loads(
        dupr("recipe", "show", "voc-tiny", "--json").stdout
    )
