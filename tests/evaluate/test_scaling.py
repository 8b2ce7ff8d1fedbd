"""Protocols on fewer devices: one rule, and what it does not touch."""

from __future__ import annotations

import pytest

from dupr_cli.errors import UsageError
from dupr_cli.evaluate.scaling import limited, scale_to_devices
from dupr_cli.recipe import EvaluateRecipe, load_recipe


@pytest.fixture
def voc() -> EvaluateRecipe:
    return load_recipe(EvaluateRecipe, "voc0712-r50c4-24k")


@pytest.mark.parametrize(("devices", "batch", "lr"), [(1, 2, 0.0025), (2, 4, 0.005), (4, 8, 0.01)])
def test_the_same_images_are_seen_on_fewer_devices(
    voc: EvaluateRecipe, devices: int, batch: int, lr: float
) -> None:
    scaled, rule = scale_to_devices(voc, devices)
    assert scaled.train.batch_size == batch
    assert scaled.train.lr == pytest.approx(lr)
    images = voc.train.iterations * voc.train.batch_size
    assert scaled.train.iterations * batch == images
    assert [m * batch for m in scaled.train.milestones] == [18_000 * 16, 22_000 * 16]
    assert f"from 8 devices to {devices}: batch 16 to {batch}" in rule


def test_enough_devices_change_nothing(voc: EvaluateRecipe) -> None:
    scaled, rule = scale_to_devices(voc, 8)
    assert scaled == voc
    assert rule.startswith("not scaled")


def test_a_batch_that_cannot_be_split_is_refused(voc: EvaluateRecipe) -> None:
    odd = voc.model_copy(update={"train": voc.train.model_copy(update={"batch_size": 20})})
    with pytest.raises(UsageError, match="8 images cannot be split over 3"):
        scale_to_devices(odd, 3)


def test_a_limit_cuts_iterations_and_test_images(voc: EvaluateRecipe) -> None:
    cut, note = limited(voc, 50)
    assert cut.test.precise_bn_batches == 50
    assert (cut.train.iterations, cut.train.warmup, cut.train.milestones) == (50, 50, [])
    assert cut.data.test_images == 50
    assert "is not a result" in note
    EvaluateRecipe.model_validate(cut.model_dump())
