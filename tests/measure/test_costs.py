"""Measured parts of batches, and what follows from them for the whole batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dupr_cli.measure.costs import StepCost, reduced
from dupr_cli.recipe import PretrainRecipe, load_recipe

RECIPE = load_recipe(PretrainRecipe, "dupr-r50-in1k-200ep")


@given(st.integers(1, 300), st.sampled_from([32, 64, 128, 256]), st.sampled_from([1, 2, 4, 8]))
def test_a_part_of_the_batch_keeps_the_size_of_a_group(
    images: int, batch: int, groups: int
) -> None:
    options = [f"data.batch_size={batch}", f"method.batch_norm.groups={groups}"]
    whole = load_recipe(PretrainRecipe, "dupr-r50-in1k-200ep", options)
    part = reduced(whole, images)
    size = part.data.batch_size // part.method.batch_norm.groups
    assert part.data.batch_size <= max(2, min(images, batch))
    assert part.data.batch_size % part.method.batch_norm.groups == 0
    if images >= batch // groups:
        assert size == batch // groups
    assert part.method.queue_length == whole.method.queue_length


def test_costs_of_a_step_and_of_an_image_are_told_apart() -> None:
    # 0.2 s once, and 0.01 s for each image.
    cost = StepCost(10, 0.3, 0.05, {"optimizer": 0.15, "momentum update": 0.05, "losses": 0.1}, 1.0)
    assert cost.images_per_second(10) == pytest.approx(10 / 0.3)
    assert cost.images_per_second(100) == pytest.approx(100 / 1.2)
