"""Fine-tuning: SGD with warm-up and milestones, then batch-norm statistics measured anew.

Region sampling draws from random numbers that depend on the iteration only, so that compared
weights differ in their backbone and in nothing else.
Source: docs/method.md, "R50-C4, shared" and "VOC".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dupr_cli.errors import RunError
from dupr_cli.evaluate.batches import Batch
from dupr_cli.evaluate.detector import Detector
from dupr_cli.progress import Reporter
from dupr_cli.recipe.evaluate import DetectionTrainSection, EvaluateRecipe


@dataclass(frozen=True)
class LossRecord:
    """Losses averaged over the iterations since the record before. iteration: done so far."""

    iteration: int
    lr: float
    losses: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.losses.values())


def learning_rate(train: DetectionTrainSection, iteration: int) -> float:
    """lr of an iteration, counted from 0: a linear rise, then a tenth at each milestone."""
    rise = min(1.0, (iteration + 1) / train.warmup) if train.warmup else 1.0
    return train.lr * rise * 0.1 ** sum(iteration >= milestone for milestone in train.milestones)


def _optimizer(detector: nn.Module, train: DetectionTrainSection) -> torch.optim.SGD:
    """Weight decay on everything but the norms' scales and shifts, as in detectron2."""
    norms = [
        parameter
        for module in detector.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    ]
    known = {id(parameter) for parameter in norms}
    others = [parameter for parameter in detector.parameters() if id(parameter) not in known]
    optimizer = torch.optim.SGD(
        others, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )
    optimizer.add_param_group({"params": norms, "weight_decay": 0.0})
    return optimizer


def train_detector(
    detector: Detector,
    batches: Iterable[Batch],
    recipe: EvaluateRecipe,
    name: str,
    reporter: Reporter,
) -> list[LossRecord]:
    """Train for the recipe's iterations; returns the losses, one record per train.log_every.

    batches: at least as many as iterations. name: of the weights, for progress and messages.
    Raises RunError when a loss is not finite.
    """
    train = recipe.train
    optimizer = _optimizer(detector, train)
    detector.train()
    records: list[LossRecord] = []
    sums: dict[str, float] = {}
    since = 0
    with reporter.task(f"train {name}", train.iterations, "iterations") as task:
        for iteration, batch in zip(range(train.iterations), batches, strict=False):
            lr = learning_rate(train, iteration)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = _seeded_losses(detector, batch, recipe.seed, iteration)
            loss = torch.stack(list(losses.values())).sum()
            values = {key: float(value.detach()) for key, value in losses.items()}
            if not math.isfinite(sum(values.values())):
                broken = ", ".join(f"{k} {v}" for k, v in values.items() if not math.isfinite(v))
                raise RunError(
                    f"{name}: {broken} at iteration {iteration + 1}, lr {lr:.3g}: training has "
                    f"diverged. Lower train.lr or raise train.warmup."
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            sums = {key: sums.get(key, 0.0) + value for key, value in values.items()}
            since += 1
            task.advance(status=f"loss {sum(sums.values()) / since:.3f}, lr {lr:.2g}")
            if since == train.log_every or iteration + 1 == train.iterations:
                means = {key: value / since for key, value in sums.items()}
                records.append(LossRecord(iteration + 1, lr, means))
                sums, since = {}, 0
    return records


def measure_batch_norm(
    detector: Detector,
    batches: Iterable[Batch],
    recipe: EvaluateRecipe,
    name: str,
    reporter: Reporter,
) -> None:
    """Replace running statistics by the mean over test.precise_bn_batches training batches.

    The moving averages belong to weights that were still changing; measured over the final ones,
    statistics are those that testing needs. Frozen norms have none and stay. Source: precise BN in
    detectron2 (Wu and Johnson 2021, section 3).
    """
    count = recipe.test.precise_bn_batches
    if not count:
        return
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    detector.train()
    with torch.no_grad(), reporter.task(f"precise BN {name}", count, "batches") as task:
        for number, batch in zip(range(count), batches, strict=False):
            _seeded_losses(detector, batch, recipe.seed, recipe.train.iterations + number)
            task.advance()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _seeded_losses(
    detector: Detector, batch: Batch, seed: int, iteration: int
) -> dict[str, torch.Tensor]:
    torch.manual_seed((seed * 1_000_003 + iteration) % 2**63)
    return detector.losses(batch.images, batch.boxes, batch.labels)
