"""A run's state to and from its checkpoints: model, optimiser, step. Nothing else is state.

The position in the data and all random streams follow from the seed and the step.
"""

from __future__ import annotations

import shutil
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


def save_run(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: PretrainRecipe,
    step: int,
) -> Path:
    """Write the checkpoint of a step; returns its folder."""
    state = CheckpointState(
        step=step,
        architecture=recipe.model.backbone,
        input_mean=list(recipe.method.augmentation.mean),
        input_std=list(recipe.method.augmentation.std),
        input_size=recipe.method.views.size,
        recipe_sha256=recipe_digest(recipe),
        files={},
    )
    momentum = {
        f"momentum.{name}": optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in _trained(model).items()
        if "momentum_buffer" in optimizer.state[parameter]
    }
    keep = recipe.train.keep_checkpoints
    return write_checkpoint(out, state, model.state_dict(), momentum, keep)


def continue_run(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, reporter: Reporter
) -> int:
    """Load the newest whole checkpoint of `out` in place; returns its step, 0 without one.

    A damaged checkpoint is passed over, with a warning that says why.
    Raises RunError when the tensors do not fit the model.
    """
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / CHECKPOINTS)
    for path in reversed(list_checkpoints(out)):
        try:
            checkpoint = Checkpoint.read(path, verify=True)
        except UsageError as error:
            reporter.warning(f"{error} An older checkpoint is used.")
            shutil.rmtree(path)
            continue
        _load(checkpoint, model, optimizer)
        MetricsLog(out).rewind(checkpoint.state.step)
        reporter.info(f"{out}: step {checkpoint.state.step} is saved; going on from there")
        return checkpoint.state.step
    MetricsLog(out).rewind(-1)
    return 0


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
