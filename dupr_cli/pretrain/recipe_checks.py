"""Warnings about a recipe that is valid but may not learn, each with advice.

They follow rules of thumb of the field and are not errors: a run starts all the same.
"""

from __future__ import annotations

import numpy as np

from dupr_cli.recipe.base import LEVEL_STRIDES
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.views.geometry import as_crop, overlap_fraction, random_crop_pair

# MoCo v2 uses 0.03 at 256 images. Below a third of the scaled rate, someone forgot to scale it;
# short runs on a CPU use several times more, but ten times is too much for any run.
_RATE_PER_IMAGE, _LOWEST_RATE, _HIGHEST_RATE = 0.03 / 256, 1 / 3, 10
# A run should be at least this many times 1 / (1 - momentum) steps long; 2.4 is enough in the demo.
_MEMORIES = 2
# A queue longer than this share of the images makes an image its own negative too often.
LARGEST_QUEUE = 1 / 4
# Largest standard deviation of the blur as a share of the view's side: MoCo v2's 2.0 at 224 pixels,
# and twice that, beyond which much of the detail is lost.
PUBLISHED_BLUR, _LARGEST_BLUR = 2 / 224, 4 / 224
# Bins smaller than this share of a feature cell mostly repeat their neighbours.
_SMALLEST_BIN = 0.5


def science_warnings(recipe: PretrainRecipe, images: int | None, steps: int | None) -> list[str]:
    """List what is questionable about a recipe, for `images` images and `steps` steps.

    None means not known yet; checks that depend on it are skipped.
    """
    return [
        *_queue(recipe, images),
        *_blur(recipe),
        *_learning_rate(recipe),
        *_momentum(recipe, steps),
        *_bins(recipe),
        *_batch_norm(recipe),
    ]


def _queue(recipe: PretrainRecipe, images: int | None) -> list[str]:
    method, batch = recipe.method, recipe.data.batch_size
    directions = 2 if method.symmetric else 1
    per_step = batch * directions
    found = []
    if method.queue_length % per_step:
        nearest = max(per_step, method.queue_length // per_step * per_step)
        found.append(
            f"method.queue_length is {method.queue_length}, not a multiple of the {per_step} keys "
            f"that enter in a step, so keys leave at uneven ages. Use {nearest}."
        )
    # Images whose keys the queue still holds, as a share of all images.
    held = method.queue_length / directions / images if images else 0.0
    if images and held > LARGEST_QUEUE:
        # With an order drawn for every epoch, the image came within this share of an epoch before.
        chance = min(1.0, held * held / 2)
        most = int(images * LARGEST_QUEUE * directions)
        found.append(
            f"method.queue_length is {method.queue_length}, and there are {images} images: an "
            f"older key of the image itself is among its negatives with a chance of {chance:.0%}. "
            f"Use at most a quarter of the images: {max(per_step, most // per_step * per_step)}."
        )
    return found


def _blur(recipe: PretrainRecipe) -> list[str]:
    size, blur = recipe.method.views.size, recipe.method.augmentation.blur
    share = blur.sigma[1] / size
    if not blur.probability or share <= _LARGEST_BLUR:
        return []
    return [
        f"method.augmentation.blur.sigma goes up to {blur.sigma[1]:g} pixels in views of {size}: "
        f"MoCo's 2.0 is for views of 224 and removes much of the detail of smaller ones. Use "
        f"[0.1, {max(0.2, round(PUBLISHED_BLUR * size, 1)):g}]."
    ]


def _learning_rate(recipe: PretrainRecipe) -> list[str]:
    lr, batch = recipe.optimizer.lr, recipe.data.batch_size
    scaled = _RATE_PER_IMAGE * batch
    if scaled * _LOWEST_RATE <= lr <= scaled * _HIGHEST_RATE:
        return []
    return [
        f"optimizer.lr is {lr:g} for a batch of {batch}; the linear rule from 0.03 at 256 gives "
        f"{scaled:.2g}. Use that, and watch the retrieval if you go far from it."
    ]


def _momentum(recipe: PretrainRecipe, steps: int | None) -> list[str]:
    momentum = recipe.method.momentum
    if steps is None or (momentum < 1 and steps * (1 - momentum) >= _MEMORIES):
        return []
    proposal = (
        f"Use {1 - 2 * _MEMORIES / steps:.3g}, or train" if steps > 6 * _MEMORIES else "Train"
    )
    return [
        f"method.momentum is {momentum:g}, but the run has {steps} steps: the key encoder hardly "
        f"leaves its random start. {proposal} longer."
    ]


def _bins(recipe: PretrainRecipe) -> list[str]:
    method = recipe.method
    random = np.random.default_rng(0)
    side = 2 * method.views.size
    pairs = [random_crop_pair(side, side, method.views, random) for _ in range(200)]
    shares = [overlap_fraction(as_crop(first), as_crop(second)) for first, second in pairs]
    share = float(np.median(shares))
    found = []
    for level, weight in method.patch.weights.items():
        bins = method.patch.bins[level]
        cells = share * method.views.size / LEVEL_STRIDES[level]
        if weight and cells / bins < _SMALLEST_BIN:
            found.append(
                f"method.patch.bins.{level} is {bins}, but the shared region of a typical pair is "
                f"{cells:.1f} cells wide at {level}, so neighbouring patches see the same cells. "
                f"Use {max(1, round(cells))} to {max(1, int(cells / _SMALLEST_BIN))}, or raise "
                f"method.views.size or method.views.min_overlap."
            )
    return found


def _batch_norm(recipe: PretrainRecipe) -> list[str]:
    norm, found = recipe.method.batch_norm, []
    if norm.groups == 1 and not norm.permute_keys:
        found.append(
            "method.batch_norm.groups is 1 and keys are not permuted, so a key shares its batch "
            "statistics with its query, which gives the answer away. Use 8 groups."
        )
    elif norm.groups == 1:
        found.append(
            "method.batch_norm makes the whole batch one group: permuting keys within it hides "
            "nothing, and queries may find their keys by the statistics. Use 8 groups."
        )
    if norm.sync and recipe.train.accumulate > 1:
        found.append(
            f"train.accumulate is {recipe.train.accumulate} with method.batch_norm.sync: the "
            f"statistics cover one part of the batch, not the whole batch."
        )
    return found
