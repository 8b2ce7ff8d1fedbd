"""Training on labels: warm-up and a schedule, then a new measurement of batch-norm statistics.

A trial is a folder with metrics.jsonl and checkpoints, like a run's, from which it resumes exactly
after an interruption. Region sampling draws random numbers that depend only on the iteration, so
that compared weights differ in their backbone and in nothing else.
Source: docs/method.md, "R50-C4, shared" and "VOC".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.run import CheckpointState, MetricsLog
from dupr_cli.errors import RunError
from dupr_cli.evaluate.detection_data import Batch
from dupr_cli.models.batch_norm import measured_statistics
from dupr_cli.progress import Reporter
from dupr_cli.recipe import recipe_digest
from dupr_cli.recipe.evaluate import DetectionTrainSection, EvaluateRecipe
from dupr_cli.runtime.parallel import World, average_gradients
from dupr_cli.runtime.phases import phase
from dupr_cli.runtime.profiling import step_done
from dupr_cli.runtime.state import TrainingState
from dupr_cli.runtime.stopping import Limits, Stop, stopped

if TYPE_CHECKING:
    from dupr_cli.evaluate.detectors import Detector, FrozenDetector

_LOSS = "loss/"
_SUM = "sum/"


@dataclass(frozen=True)
class LossRecord:
    """Losses averaged over the iterations since the last record. iteration: how many are done."""

    iteration: int
    lr: float
    losses: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True)
class Trial:
    """One training of one of the weights. name: for progress and messages. folder: its state."""

    detector: Detector | FrozenDetector
    recipe: EvaluateRecipe
    seed: int
    name: str
    folder: Path
    world: World

    @property
    def log(self) -> MetricsLog:
        return MetricsLog(self.folder)

    def losses(self) -> list[LossRecord]:
        """All records logged so far."""
        return [
            LossRecord(
                int(line["step"]),
                line["lr"],
                {k.removeprefix(_LOSS): v for k, v in line.items() if k.startswith(_LOSS)},
            )
            for line in self.log.read()
            if "lr" in line
        ]


def learning_rate(train: DetectionTrainSection, iteration: int) -> float:
    """lr of an iteration, counted from 0: a linear rise, then the schedule."""
    rise = min(1.0, (iteration + 1) / train.warmup) if train.warmup else 1.0
    if train.schedule == "cosine":
        done = max(0, iteration - train.warmup) / max(1, train.iterations - train.warmup)
        return train.lr * rise * 0.5 * (1 + math.cos(math.pi * done))
    return train.lr * rise * 0.1 ** sum(iteration >= milestone for milestone in train.milestones)


def make_optimizer(detector: nn.Module, train: DetectionTrainSection) -> torch.optim.Optimizer:
    """The optimiser of everything that is trained, with `factor` of lr in each parameter group.

    Weight decay acts on everything but the norms' scales and shifts, as in detectron2.
    """
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
    norms = {
        id(parameter)
        for module in detector.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters()
    }
    backbone = {id(parameter) for parameter in _backbone_parameters(detector)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in detector.parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if id(parameter) in norms else train.weight_decay
        factor = train.backbone_lr if id(parameter) in backbone else 1.0
        groups.setdefault((factor, decay), []).append(parameter)
    of_groups = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in groups.items()
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(of_groups, lr=train.lr)
    return torch.optim.SGD(of_groups, lr=train.lr, momentum=train.momentum)


def _backbone_parameters(detector: nn.Module) -> list[nn.Parameter]:
    # Detectors are made of torchvision's parts, whose import no dry run needs to wait for.
    from dupr_cli.evaluate.detectors import Detector

    return list(detector.backbone.parameters()) if isinstance(detector, Detector) else []


def train_detector(
    trial: Trial,
    batches_from: Callable[[int], Generator[Batch, None, None]],
    reporter: Reporter,
    limits: Limits | None = None,
    test: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train for the recipe's iterations, continuing from the trial's newest whole checkpoint.

    batches_from: this process's batches from an iteration on, at least as many as are left. test:
    metrics of the current detector, called every test.every iterations.
    Raises RunError when a loss is not finite, and StoppedRunError when it is asked to stop before
    the end; the same call continues.
    """
    train, detector, world = trial.recipe.train, trial.detector, trial.world
    limits = limits or Limits()
    optimizer = make_optimizer(detector, train)
    half = train.precision == "float16"
    scaler = torch.amp.GradScaler(world.device.type, enabled=half)
    state = TrainingState(trial.name, trial.folder, detector, optimizer, scaler, world)
    found = state.load(reporter)
    done = found.step if found else 0
    sums = _Sums.from_extra(found.extra if found else {})
    if done >= train.iterations:
        return
    parameters = [p for p in detector.parameters() if p.requires_grad]
    detector.train()
    shown = _shown(trial, trial.log.latest())
    with (
        _delayed(detector) as train_backbone,
        Stop(limits, launched=world.size > 1) as stop,
        closing(batches_from(done)) as batches,
        reporter.task(f"train {trial.name}", train.iterations, "iterations", done) as progress,
    ):
        for iteration in range(done, train.iterations):
            lr = learning_rate(train, iteration)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            train_backbone(iteration >= train.freeze_iterations)
            with phase("data wait"):
                batch = next(batches)
            with phase("losses"):
                losses = _seeded_losses(trial, batch, iteration)
            optimizer.zero_grad(set_to_none=True)
            with phase("backward"):
                torch.autograd.backward(scaler.scale(torch.stack(list(losses.values())).sum()))
            average_gradients(parameters, world)
            if train.gradient_clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, train.gradient_clip)
            with phase("optimizer"):
                scaler.step(optimizer)
            scaler.update()
            sums.add(losses)

            count = iteration + 1
            last = count == train.iterations
            code = int(world.max(torch.tensor(float(stop.code)))) if world.size > 1 else stop.code
            stopping = not last and (code or stop.steps_are_done(count - done))
            if count % train.log_every == 0 or last:
                record = sums.record(count, lr, trial)
                if world.is_main:
                    losses_by_name = {f"{_LOSS}{k}": v for k, v in record.losses.items()}
                    trial.log.append({"step": count, "lr": lr, **losses_by_name})
                progress.advance(0, f"loss {record.total:.3f}, lr {lr:.2g}{shown}")
            step_done()
            progress.advance()
            if last or stopping or count % train.checkpoint_every == 0:
                state.save(_checkpoint_facts(trial, count, sums), keep=1)
            every = trial.recipe.test.every
            if test is not None and every and not last and count % every == 0:
                scores = test()
                detector.train()
                if world.is_main:
                    trial.log.append({"step": count, **scores})
                shown = _shown(trial, scores)
            if stopping:
                place = f"iteration {count} of {train.iterations} of {trial.name} is saved"
                raise stopped(code, limits, f"{place} in {trial.folder}")


@contextmanager
def _delayed(detector: nn.Module) -> Iterator[Callable[[bool], None]]:
    """A function that switches the training of the backbone; it is on again afterwards.

    Parameters without a gradient are left alone by the optimiser, momentum and decay included.
    """
    trained = [p for p in _backbone_parameters(detector) if p.requires_grad]

    def switch(on: bool) -> None:
        for parameter in trained:
            parameter.requires_grad_(on)

    try:
        yield switch
    finally:
        switch(True)


def _shown(trial: Trial, scores: Mapping[str, float]) -> str:
    metric = trial.recipe.primary_metric
    return f", {metric} {scores[metric]:.1f}" if metric in scores else ""


class _Sums:
    """Losses summed since the last record; they stay on the device until they are read."""

    def __init__(self, sums: dict[str, float], since: int) -> None:
        self._sums: dict[str, Tensor | float] = dict(sums)
        self._since = since

    def add(self, losses: Mapping[str, Tensor]) -> None:
        self._sums = {k: self._sums.get(k, 0.0) + v.detach().float() for k, v in losses.items()}
        self._since += 1

    def record(self, iteration: int, lr: float, trial: Trial) -> LossRecord:
        """The means over iterations and processes; resets the sums. Raises RunError, see above."""
        values = torch.tensor([float(v) for v in self._sums.values()], dtype=torch.float64)
        means = (trial.world.sum(values) / trial.world.size / self._since).tolist()
        losses = dict(zip(self._sums, means, strict=True))
        broken = ", ".join(f"{k} {v}" for k, v in losses.items() if not math.isfinite(v))
        if broken:
            raise RunError(
                f"{trial.name}: {broken} at iteration {iteration}, lr {lr:.3g}: training has "
                f"diverged. Lower train.lr or raise train.warmup."
            )
        self._sums, self._since = {}, 0
        return LossRecord(iteration, lr, losses)

    def to_extra(self) -> dict[str, float]:
        return {"since": self._since, **{f"{_SUM}{k}": float(v) for k, v in self._sums.items()}}

    @classmethod
    def from_extra(cls, extra: Mapping[str, float]) -> _Sums:
        sums = {k.removeprefix(_SUM): v for k, v in extra.items() if k.startswith(_SUM)}
        return cls(sums, int(extra.get("since", 0)))


def _checkpoint_facts(trial: Trial, iteration: int, sums: _Sums) -> CheckpointState:
    return CheckpointState(
        step=iteration,
        architecture=trial.detector.architecture,
        input_mean=trial.detector.mean.flatten().tolist(),
        input_std=trial.detector.std.flatten().tolist(),
        input_size=trial.recipe.data.test_size,
        recipe_sha256=recipe_digest(trial.recipe),
        extra=sums.to_extra(),
    )


def measure_batch_norm(trial: Trial, batches: Iterator[Batch], reporter: Reporter) -> None:
    """Measure batch-norm statistics over test.precise_bn_batches training batches."""
    from dupr_cli.evaluate.detectors.norms import batch_norms

    count, norms = trial.recipe.test.precise_bn_batches, batch_norms(trial.detector)
    if not count or not norms:
        return
    with (
        measured_statistics(trial.detector),
        reporter.task(f"precise BN {trial.name}", count, "batches") as task,
    ):
        for number in range(count):
            _seeded_losses(trial, next(batches), trial.recipe.train.iterations + number)
            task.advance()
    for norm in norms:
        for statistics in (norm.running_mean, norm.running_var):
            assert statistics is not None
            statistics.copy_(trial.world.sum(statistics) / trial.world.size)


def _seeded_losses(trial: Trial, batch: Batch, iteration: int) -> dict[str, Tensor]:
    number = (trial.seed * 1_000_003 + iteration) * trial.world.size + trial.world.rank
    torch.manual_seed(number % 2**63)
    # A trial's batches fit its detector: images, or features of a frozen backbone.
    losses: dict[str, Tensor] = cast(Any, trial.detector).losses(batch.images, batch.targets)
    return losses
