"""Run protocols on fewer devices than they assume: one printed rule for batch, lr and schedule.

Linear scaling: the batch shrinks with the devices, the learning rate with the batch, and the
schedule grows in proportion, so that the same images are seen. Source: Goyal et al. 2017; the
reference world size of detectron2.
"""

from __future__ import annotations

from dupr_cli.errors import UsageError
from dupr_cli.recipe import EvaluateRecipe


def scale_to_devices(recipe: EvaluateRecipe, devices: int) -> tuple[EvaluateRecipe, str]:
    """The recipe for this many devices, and the rule in words.

    Raises UsageError when the batch cannot be split over them.
    """
    train = recipe.train
    if devices >= train.reference_devices:
        return recipe, (
            f"not scaled: the schedule is for {train.reference_devices} devices and the run has "
            f"{devices}"
        )
    batch = max(devices, round(train.batch_size * devices / train.reference_devices))
    if batch % devices:
        raise UsageError(f"a batch of {batch} images cannot be split over {devices} devices.")
    factor = train.batch_size / batch
    longer = {
        "iterations": round(train.iterations * factor),
        "warmup": round(train.warmup * factor),
        "freeze_iterations": round(train.freeze_iterations * factor),
        "milestones": [round(milestone * factor) for milestone in train.milestones],
    }
    changed = train.model_copy(update={"batch_size": batch, "lr": train.lr / factor, **longer})
    rule = (
        f"scaled from {train.reference_devices} devices to {devices}: batch {train.batch_size} to "
        f"{batch}, lr {train.lr:g} to {changed.lr:g}, iterations {train.iterations} to "
        f"{changed.iterations} (milestones and warm-up alike)"
    )
    return recipe.model_copy(update={"train": changed}), rule


def rescaled(recipe: EvaluateRecipe, iterations: int) -> EvaluateRecipe:
    """The recipe with a schedule of this many iterations: warm-up, milestones and the time before
    the backbone is trained keep their shares of it."""
    train = recipe.train
    factor = iterations / train.iterations
    milestones = sorted({round(milestone * factor) for milestone in train.milestones})
    changed = {
        "iterations": iterations,
        "warmup": round(train.warmup * factor),
        "freeze_iterations": round(train.freeze_iterations * factor),
        "milestones": [m for m in milestones if 0 < m < iterations],
    }
    return recipe.model_copy(update={"train": train.model_copy(update=changed)})


def limited(recipe: EvaluateRecipe, limit: int) -> tuple[EvaluateRecipe, str]:
    """The recipe shortened for a trial: at most `limit` iterations, and as many test images."""
    train, data = recipe.train, recipe.data
    iterations = min(limit, train.iterations)
    shorter = {
        "iterations": iterations,
        "warmup": min(train.warmup, iterations),
        "milestones": [m for m in train.milestones if m < iterations],
    }
    images = min(limit, data.test_images or limit)
    batches = min(limit, recipe.test.precise_bn_batches)
    changed: dict[str, object] = {"test_images": images}
    if recipe.is_frozen and data.labels is None:
        # Features are computed of all labelled images, wanted or not.
        changed["labels"] = iterations * train.batch_size
    cut = {
        "test": recipe.test.model_copy(update={"precise_bn_batches": batches}),
        "train": train.model_copy(update=shorter),
        "data": data.model_copy(update=changed),
    }
    note = (
        f"limited to {iterations} iterations and {images} test images: its {recipe.primary_metric} "
        f"is not a result"
    )
    return recipe.model_copy(update=cut), note
