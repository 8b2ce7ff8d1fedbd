"""A run's state to and from its checkpoints: model, optimiser, loss scaler, step.

Nothing else is state: the position in the data, the learning rate and all random streams follow
from the seed and the step.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.files import remove_leftovers
from dupr_cli.artifacts.run import (
    CHECKPOINTS,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    CheckpointState,
    MetricsLog,
    list_checkpoints,
    write_checkpoint,
)
from dupr_cli.artifacts.weights import read_safetensors
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import Reporter
from dupr_cli.recipe import PretrainRecipe, recipe_digest
from dupr_cli.runtime.parallel import World


@dataclass(frozen=True)
class Trained:
    """What a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def save_run(out: Path, trained: Trained, recipe: PretrainRecipe, step: int, world: World) -> None:
    """Write the checkpoint of a step, by rank 0 while the others wait.

    Raises RunError when the processes' parameters or queues have come apart.
    """
    world.require_same(trained.model.state_dict(), "parameters or queues")
    if world.is_main:
        _write(out, trained, recipe, step, world)
    world.wait()


def _write(out: Path, trained: Trained, recipe: PretrainRecipe, step: int, world: World) -> None:
    state = CheckpointState(
        step=step,
        architecture=recipe.model.backbone,
        input_mean=list(recipe.method.augmentation.mean),
        input_std=list(recipe.method.augmentation.std),
        input_size=recipe.method.views.size,
        recipe_sha256=recipe_digest(recipe),
        files={},
        processes=world.size,
        loss_scaler=trained.scaler.state_dict(),
        method=recipe.method.title,
    )
    optimizer = trained.optimizer
    momentum = {
        f"momentum.{name}": optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in _trained(trained.model).items()
        if optimizer.state[parameter].get("momentum_buffer") is not None
    }
    train = recipe.train
    write_checkpoint(
        out, state, trained.model.state_dict(), momentum, train.keep_checkpoints, train.keep_every
    )


def continue_run(out: Path, trained: Trained, world: World, reporter: Reporter) -> int:
    """Load the newest whole checkpoint of `out` in place; returns its step, 0 without one.

    A damaged checkpoint is passed over, with a warning that says why.
    Raises RunError when the tensors do not fit the model.
    """
    if world.is_main:
        _prepare(out, reporter)
    world.wait()
    paths = list_checkpoints(out)
    step = 0
    if paths:
        checkpoint = Checkpoint.read(paths[-1])
        _load(checkpoint, trained)
        step = checkpoint.state.step
        reporter.info(f"{out}: step {step} is saved; going on from there")
        if checkpoint.state.processes != world.size:
            reporter.info(
                f"the run was on {checkpoint.state.processes} processes and is on {world.size} "
                f"now: the same batches, keys and groups, but sums in another order, so that it is "
                f"equal to rounding, not bit for bit"
            )
    if world.is_main:
        MetricsLog(out).rewind(step if paths else -1)
    world.require_same(trained.model.state_dict(), "parameters or queues")
    return step


def _prepare(out: Path, reporter: Reporter) -> None:
    """Leave only whole checkpoints, so that all processes take the same one."""
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / CHECKPOINTS)
    for path in reversed(list_checkpoints(out)):
        try:
            Checkpoint.read(path, verify=True)
        except UsageError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            reporter.warning(
                f"{error} It is passed over and set aside as {aside.name}; delete it when you like."
            )
            continue
        return


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _load(checkpoint: Checkpoint, trained: Trained) -> None:
    model, optimizer = trained.model, trained.optimizer
    tensors, _ = read_safetensors(checkpoint.path / MODEL_FILE)
    own = model.state_dict()
    differing = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if differing:
        raise RunError(
            f"{checkpoint.path}: the checkpoint is of another model "
            f"({checkpoint.state.architecture}): {len(differing)} tensors do not match, "
            f"{differing[0]} is the first."
        )
    model.load_state_dict(tensors)
    momentum, _ = read_safetensors(checkpoint.path / OPTIMIZER_FILE)
    for name, parameter in _trained(model).items():
        buffer: Tensor | None = momentum.get(f"momentum.{name}")
        if buffer is not None:
            # In the parameter's own memory layout, or the next step is rounded differently.
            state = torch.empty_like(parameter)
            state.copy_(buffer)
            optimizer.state[parameter]["momentum_buffer"] = state
    if checkpoint.state.loss_scaler and trained.scaler.is_enabled():
        trained.scaler.load_state_dict(dict(checkpoint.state.loss_scaler))
