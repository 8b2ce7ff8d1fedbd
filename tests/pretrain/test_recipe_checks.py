"""Advice about recipes: said where it applies, silent where the recipe is ordinary."""

from __future__ import annotations

import re

import pytest

from dupr_cli.pretrain.recipe_checks import science_warnings
from dupr_cli.recipe import PretrainRecipe, load_recipe
from dupr_cli.recipe.load import shipped_recipes


def advice(*overrides: str, images: int | None = None, steps: int | None = None) -> str:
    recipe = load_recipe(PretrainRecipe, "dupr-r50-in1k-200ep", overrides)
    return "\n".join(science_warnings(recipe, images, steps))


def test_shipped_recipes_need_no_advice() -> None:
    names = [name for name, path in shipped_recipes().items() if path.parent.name == "pretrain"]
    assert len(names) >= 12
    for name in names:
        recipe = load_recipe(PretrainRecipe, name)
        assert science_warnings(recipe, 1_281_167, recipe.train.steps) == [], name


@pytest.mark.parametrize(
    ("overrides", "images", "steps", "message"),
    [
        (["method.queue_length=65000"], None, None, "not a multiple of the 256 keys .* Use 64768"),
        ([], 10_000, None, "65536, and there are 10000 images.* chance of 100%.* quarter.*: 2304"),
        (["method.queue_length=2048"], 2744, None, "with a chance of 28%"),
        (["method.queue_length=512"], 2744, None, ""),
        (
            ["method.queue_length=1024", "method.symmetric=true", "data.batch_size=64"],
            2744, None, "",
        ),
        (["optimizer.lr=3"], None, None, "lr is 3 for a batch of 256.* gives 0.03"),
        (
            ["data.batch_size=1024", "method.batch_norm.groups=32"], None, None,
            "lr is 0.03 for a batch of 1024.* gives 0.12",
        ),
        ([], None, 500, "momentum is 0.999, but the run has 500 steps.* Use 0.992"),
        (
            ["method.views.size=64", "method.patch.bins={res4: 4, res5: 2}"], None, None,
            r"blur.sigma goes up to 2 pixels in views of 64.* Use \[0.1, 0.6\]",
        ),
        (
            ["method.views.size=64", "method.patch.bins={res4: 4, res5: 2}",
             "method.augmentation.blur.sigma=[0.1, 0.6]"],
            None, None, "",
        ),
        (
            ["method.views={size: 64, scale: [0.05, 0.1]}", "method.patch.bins={res4: 4, res5: 2}",
             "method.views.min_overlap=0.1"],
            None, None, "bins.res4 is 4, but the shared region of a typical pair",
        ),
        (["method.batch_norm={groups: 1, permute_keys: false}"], None, None, "gives the answer"),
        (["method.batch_norm={groups: 1}"], None, None, "the whole batch one group"),
        (
            ["method.batch_norm={groups: 1, sync: true}", "train.accumulate=2"], None, None,
            "cover one part of the batch",
        ),
    ],
)  # fmt: skip
def test_advice_says_what_and_what_to_do(
    overrides: list[str], images: int | None, steps: int | None, message: str
) -> None:
    found = advice(*overrides, images=images, steps=steps)
    assert re.search(message, found), found
    if not message:
        assert found == ""
