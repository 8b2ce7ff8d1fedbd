"""`dupr plan`: a proposal that fits images, machine and time, as a recipe that runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from dupr_cli.recipe import PretrainRecipe, load_recipe
from tests.support.command_line import TINY_SET, dupr
from tests.support.images import write_shards
from tests.support.recipes import SMALL_NETWORK

QUICK = ("--seconds", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("plan") / "shards", 640, per_shard=160)


def test_a_proposal_is_a_recipe_that_fits_and_runs(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    result = dupr("plan", shards, *QUICK, "--hours", 1, "--write", file, "--json",
                  "--set", SMALL_NETWORK)  # fmt: skip
    found: dict[str, Any] = json.loads(result.stdout)
    recipe = load_recipe(PretrainRecipe, str(file))
    assert recipe.model.backbone == SMALL_NETWORK.partition("=")[2]
    assert recipe.method.queue_length <= found["images"] / 4
    assert recipe.method.queue_length % recipe.data.batch_size == 0
    assert recipe.method.views.size == 32  # the images are 40 pixels high
    assert dict(recipe.method.patch.bins) == {"res4": 2, "res5": 1}
    assert recipe.train.steps == found["steps"]
    assert 0.8 < found["estimate"]["hours"] < 1
    assert found["estimate"]["measured"]
    dry = dupr("pretrain", file, "--data", shards, "--out", tmp_path / "run", "--dry-run")
    assert "method.queue_length" not in dry.stdout.partition("stage:")[0]
    text = file.read_text()
    assert text.startswith("# Proposed by `dupr plan` for ")
    assert all(f"#   {choice['key']}: " in text for choice in found["keys"])


def test_the_users_recipe_keeps_its_values(shards: Path) -> None:
    result = dupr("plan", shards, *QUICK, "--recipe", "dupr-r18-cpu-smoke", *TINY_SET,
                  "--set", SMALL_NETWORK, "--json")  # fmt: skip
    found = json.loads(result.stdout)
    changed = {c["key"] for c in found["keys"] if c["why"] != "as given"}
    assert changed <= {"data.workers"}
    assert found["steps"] == 6


def test_a_file_of_ones_own_can_be_extended_from_elsewhere(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mine, proposed = tmp_path / "a" / "mine.yaml", tmp_path / "proposed.yaml"
    mine.write_text("stage: pretrain\nextends: dupr-r18-cpu-smoke\nseed: 5\n")
    dupr("plan", shards, *QUICK, "--recipe", mine, *TINY_SET, "--set", SMALL_NETWORK,
         "--write", proposed)  # fmt: skip
    assert load_recipe(PretrainRecipe, str(proposed)).seed == 5


def test_a_queue_that_is_too_long_is_cut(shards: Path) -> None:
    result = dupr("plan", shards, *QUICK, "--recipe", "dupr-r18-cpu-smoke",
                  "--set", SMALL_NETWORK)  # fmt: skip
    assert "method.queue_length=128  (at most a quarter of 576 images" in result.stdout
    assert "--write FILE" in result.stderr


def test_a_detector_decides_the_backbone(shards: Path) -> None:
    pytest.importorskip("transformers")
    result = dupr("plan", shards, *QUICK, "--detector", "d-fine-n", *TINY_SET, "--json")
    keys = {c["key"]: c["value"] for c in json.loads(result.stdout)["keys"]}
    assert keys["model.backbone"] == "transformers:hgnetv2_b0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--detector", "yolo11"), "--detector yolo11: use one of torchvision, detectron2"),
        (("--write", "{there}"), "exists already"),
        (("--hours", "0.0001"), "no run of fewer than 100 is of use"),
        (("--set", "nonsense.key=1"), "nonsense"),
    ],
)
def test_wrong_usage_is_named(
    shards: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    there = tmp_path / "there.yaml"
    there.write_text("mine")
    given = [argument.format(there=there) for argument in arguments]
    network = () if "nonsense" in message else ("--set", SMALL_NETWORK)
    result = dupr("plan", shards, *QUICK, *network, *given, code=2)
    assert message in " ".join(result.stderr.split())
    assert there.read_text() == "mine"
