"""The learning rate of each of the weights: chosen on a part of the training labels, alike for all.

A rate that suits one start may not suit another, so a comparison at one rate may compare rates.
Every factor of `train.lr_grid` gets one trial on the other part of the labelled images; these
trials are kept, and reused, like all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dupr_cli.datasets.labelled import LabelledSet
from dupr_cli.errors import UsageError
from dupr_cli.evaluate.subsets import require_objects, stratified
from dupr_cli.evaluate.trials import Outcome
from dupr_cli.recipe import EvaluateRecipe


@dataclass(frozen=True)
class ChosenRate:
    """The rate that the trials of some weights use. scores: the metric that decides, on the
    validation part, by lr."""

    lr: float
    scores: dict[float, float]


@dataclass(frozen=True)
class RateTrial:
    """A trial of one rate. fold: train on the first set, and validate on the second."""

    recipe: EvaluateRecipe
    folder: Path
    fold: tuple[LabelledSet, LabelledSet]


def validation_fold(
    labelled: LabelledSet, share: float, seed: int, key: str
) -> tuple[LabelledSet, LabelledSet]:
    """The images to train on and to validate on; every class keeps its share in the second.

    key: the recipe key that asks for it. Raises UsageError when there are too few images for both,
    or nothing to find in the second.
    """
    count = round(share * len(labelled))
    if not 0 < count < len(labelled):
        raise UsageError(
            f"{key}: {len(labelled)} labelled images are too few to validate on {share:.0%} of "
            f"them. Leave the key out, or give more labels. (recipe key: {key})"
        )
    held = set(stratified(labelled.annotations, count, [seed, 1]))
    rest = [i for i in range(len(labelled)) if i not in held]
    validation = labelled.subset(sorted(held))
    require_objects(validation, f"the part that validates ({key})")
    return labelled.subset(rest), validation


def choose_rate(
    recipe: EvaluateRecipe,
    labelled: LabelledSet,
    folder: Path,
    seed: int,
    finished: Callable[[RateTrial], Outcome],
) -> ChosenRate:
    """Try each factor of the grid, and take the rate with the highest result, the lowest of equals.

    labelled: the images that the trials train on. folder: of the weights. seed: of these trials.
    finished: runs a trial, or reads its result.
    """
    train = recipe.train
    fold = validation_fold(labelled, train.lr_validation, recipe.data.labels_seed, "train.lr_grid")
    scores = {}
    for factor in sorted(train.lr_grid):
        tried = with_rate(recipe, train.lr * factor)
        trial = RateTrial(tried, folder / f"lr-{factor:g}-seed-{seed}", fold)
        scores[tried.train.lr] = finished(trial).result.metrics[recipe.primary_metric]
    return ChosenRate(max(scores, key=lambda lr: (scores[lr], -lr)), scores)


def with_rate(recipe: EvaluateRecipe, lr: float) -> EvaluateRecipe:
    """The recipe with another learning rate."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": lr})})
