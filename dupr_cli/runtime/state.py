"""Saves and loads the state of a training: model, optimiser, loss scaler, step.

Pre-training and fine-tuning both use this module. They have no other state: the position in the
data, the learning rate and all random streams follow from the seed and the step.
"""

from __future__ import annotations

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
from dupr_cli.runtime.parallel import World

# What SGD and AdamW keep for each parameter; SGD's is stored under a shorter name.
_KINDS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
_PREFIXES = {"momentum_buffer": "momentum"}


@dataclass(frozen=True)
class TrainingState:
    """The objects that a step changes, and the folder of checkpoints. name: for messages."""

    name: str
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    world: World

    def tensors(self) -> dict[str, Tensor]:
        """The state dict without repetition: a module may have two names."""
        first: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), (name, tensor))
        return dict(first.values())

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.tensors().items() if isinstance(p, nn.Parameter)}

    def _renamed(self, saved: dict[str, Tensor], before: str = "") -> dict[str, Tensor]:
        """Tensors of the names that earlier versions gave to a backbone's, under the present ones.

        before: precedes the names of the model's tensors.
        """
        for path, module in self.model.named_modules():
            own_names = getattr(module, "own_names", None)
            prefix = f"{before}{path}." if path else before
            if own_names is not None:
                inner = {n.removeprefix(prefix): n for n in saved if n.startswith(prefix)}
                taken = {name: saved.pop(full) for name, full in inner.items()}
                saved.update({prefix + name: t for name, t in own_names(taken).items()})
        return saved

    def save(self, facts: CheckpointState, keep: int, keep_every: int | None = None) -> None:
        """Write the checkpoint of facts.step on rank 0 while the others wait.

        This function fills in processes and loss scaler. keep, keep_every: see `write_checkpoint`.
        Raises RunError when tensors differ between processes, or writing fails.
        """
        self._require_same()
        if self.world.is_main:
            facts.processes, facts.loss_scaler = self.world.size, self.scaler.state_dict()
            buffers = {
                f"{_PREFIXES.get(kind, kind)}.{name}": buffer
                for name, parameter in self._parameters().items()
                for kind, buffer in self.optimizer.state.get(parameter, {}).items()
                if buffer is not None
            }
            write_checkpoint(self.folder, facts, self.tensors(), buffers, keep, keep_every)
        self.world.wait()

    def _require_same(self) -> None:
        self.world.require_same(self.tensors(), "parameters or buffers")

    def load(self, reporter: Reporter) -> CheckpointState | None:
        """Load the newest whole checkpoint in place, and drop log lines after it.

        Returns the state of the checkpoint, or None without one. Damaged checkpoints are set aside
        with a warning that gives the reason. Raises RunError when the tensors do not fit the model.
        """
        if self.world.is_main:
            self._set_damaged_aside(reporter)
        self.world.wait()
        paths = list_checkpoints(self.folder)
        found = None
        if paths:
            checkpoint = Checkpoint.read(paths[-1])
            self._fill(checkpoint)
            found = checkpoint.state
            reporter.info(f"{self.name}: continues from step {found.step}")
            if found.processes != self.world.size:
                reporter.info(
                    f"the run had {found.processes} processes and now has {self.world.size}: "
                    f"batches, keys and groups are the same, but sums are in another order, so "
                    f"results agree up to rounding, not bit for bit"
                )
        if self.world.is_main:
            MetricsLog(self.folder).rewind(found.step if found else -1)
        self._require_same()
        return found

    def _set_damaged_aside(self, reporter: Reporter) -> None:
        """Leave only whole checkpoints, so that all processes load the same one."""
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / CHECKPOINTS)
        for path in reversed(list_checkpoints(self.folder)):
            try:
                Checkpoint.read(path, verify=True)
            except UsageError as error:
                aside = _unused(path.with_name(f"damaged-{path.name}"))
                path.rename(aside)
                reporter.warning(
                    f"{error} It is skipped and set aside as {aside.name}, which you may delete."
                )
                continue
            return

    def _fill(self, checkpoint: Checkpoint) -> None:
        saved = self._renamed(read_safetensors(checkpoint.path / MODEL_FILE)[0])
        own = self.tensors()
        differing = sorted(
            name
            for name in own.keys() | saved.keys()
            if name not in own or name not in saved or own[name].shape != saved[name].shape
        )
        if differing:
            raise RunError(
                f"{checkpoint.path}: the checkpoint is of another model "
                f"({checkpoint.state.architecture}): {len(differing)} tensors do not match; the "
                f"first is {differing[0]}."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self._fill_optimizer(read_safetensors(checkpoint.path / OPTIMIZER_FILE)[0])
        if checkpoint.state.loss_scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(checkpoint.state.loss_scaler))

    def _fill_optimizer(self, saved: dict[str, Tensor]) -> None:
        for kind in ("", *_KINDS):
            saved = self._renamed(saved, f"{_PREFIXES.get(kind, kind)}." if kind else "")
        for name, parameter in self._parameters().items():
            for kind in _KINDS:
                buffer = saved.get(f"{_PREFIXES.get(kind, kind)}.{name}")
                if buffer is None and kind == "momentum_buffer":
                    # Fine-tuning in dupr 0.1 saved momentum under the parameter's plain name.
                    buffer = saved.get(name)
                if buffer is None:
                    continue
                # In another memory layout than the parameter's, the next step would be rounded
                # differently. A step count has another shape, and stays as it is.
                like = parameter if buffer.shape == parameter.shape else buffer
                state = torch.empty_like(like, requires_grad=False).copy_(buffer)
                self.optimizer.state[parameter][kind] = state


def _unused(path: Path) -> Path:
    """The path, with a number appended if the name is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())
