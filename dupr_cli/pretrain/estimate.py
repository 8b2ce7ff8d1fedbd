"""How long a run takes, and the memory and disk it needs, before its first step.

The estimate counts operations and sizes of the network without computing anything, and measures
only the device's matrix products. It is right within a factor of two or so, enough to tell hours
from months; `dupr plan` measures real steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import as_backbone, make_backbone
from dupr_cli.models.resnet_shapes import resnet_shapes, stage_channels
from dupr_cli.recipe.base import LEVELS, Level
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.runtime.loader import LOADER_BYTES
from dupr_cli.runtime.machine import device_memory_bytes, matrix_rate

# Share of the rate of large matrix products that a whole step reaches. CPU: measured, see
# docs/benchmarks.md. GPU: usual for ResNets in half precision.
_UTILISATION = {"cpu": 0.45, "cuda": 0.25}
# A forward pass of the key encoder, and a forward and a backward pass of the query encoder.
_PASSES = 4
# Key and query parameters, gradients and momentum.
_COPIES = 4
# What a process takes before it holds a network, in bytes.
_PROCESS = {"cpu": 700 * 2**20, "cuda": 500 * 2**20}
# Operations of torchvision's ResNets for an image of this side, and bytes of their activations, as
# `counted` finds them: both grow with the area. Counting needs torchvision, whose import takes
# longer than all else in a dry run.
_KNOWN_SIDE = 224
KNOWN = {
    "resnet18": (3.6271e9, 22.22e6),
    "resnet34": (7.3265e9, 32.28e6),
    "resnet50": (8.1743e9, 86.11e6),
    "resnet101": (15.5987e9, 127.27e6),
    "resnext50_32x4d": (8.4569e9, 112.47e6),
    "wide_resnet50_2": (22.7919e9, 112.47e6),
}
# The estimate of memory is rough, so that only a run of this many times what is there is refused.
_CERTAINLY = 2
_LONG_HOURS = 14 * 24
_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a run will take, without the waits for its data.

    hours: of the steps that are left. memory_gib: peak on the device; on a CPU, of all processes.
    disk_gib: of the checkpoints that are kept. measured: from real steps, not from operations.
    """

    images_per_second: float
    hours: float
    memory_gib: float
    disk_gib: float
    measured: bool = False

    def __str__(self) -> str:
        how = "measured" if self.measured else "from operations; `dupr plan` measures"
        return (
            f"about {describe_hours(self.hours)} at {self.images_per_second:.3g} images/s, "
            f"{self.memory_gib:.1f} GiB of memory, {self.disk_gib:.1f} GiB of disk ({how})"
        )


@dataclass(frozen=True)
class NetworkSize:
    """operations: of a forward pass of one image. activations: bytes that its backward pass needs.
    parameters: their number, heads included."""

    operations: float
    activations: float
    parameters: int


def describe_hours(hours: float) -> str:
    """A duration as people say it: 40 minutes, 7 hours, 12 days, 8 months."""
    for size, unit in ((24 * 365, "years"), (24 * 30.4, "months"), (24, "days"), (1, "hours")):
        if hours >= 2 * size:
            return f"{hours / size:.0f} {unit}"
    minutes = max(1, round(hours * 60))
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def network_size(recipe: PretrainRecipe) -> NetworkSize:
    """Sizes of the backbone at the recipe's views.

    torchvision's ResNets are known; other networks are counted on tensors without values.
    """
    method = recipe.method
    name, in_channels = recipe.model.backbone, method.augmentation.channels
    if in_channels == 3 and name in KNOWN:
        area = (method.views.size / _KNOWN_SIDE) ** 2
        operations, activations = (value * area for value in KNOWN[name])
        shapes = resnet_shapes(name, in_channels)
        own = sum(math.prod(v) for k, v in shapes.items() if k.endswith((".weight", ".bias")))
        channels = dict(zip(LEVELS, stage_channels(name), strict=True))
    else:
        operations, activations, own, channels = counted(recipe)
    kinds = [v for part in (method.image, method.patch) for v in LEVELS if part.weights.get(v)]
    heads = sum(channels[v] * (channels[v] + method.embedding_dim) for v in kinds)
    return NetworkSize(operations, activations, own + heads)


def counted(recipe: PretrainRecipe) -> tuple[float, float, int, dict[Level, int]]:
    """Operations and activations of an image, parameters, and channels of each level."""
    # This module takes a second to import, and only these networks need it.
    from torch.utils.flop_counter import FlopCounterMode

    method = recipe.method
    kept: dict[int, Tensor] = {}  # holding them keeps their numbers apart

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor
        return tensor

    with torch.device("meta"):
        backbone = make_backbone(recipe.model.backbone, method.augmentation.channels)
        backbone.train()
        side = method.views.size
        view = torch.empty(2, method.augmentation.channels, side, side)  # norms may need two
        levels = method.levels
        counter = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), counter:
            backbone(view, levels, levels[-1])
    activations = sum(t.numel() * t.element_size() for t in kept.values()) / len(view)
    own = sum(p.numel() for p in backbone.parameters())
    channels = dict(as_backbone(backbone).channels)
    return counter.get_total_flops() / len(view), activations, own, channels


def disk_gib(recipe: PretrainRecipe, size: NetworkSize) -> float:
    """Of the checkpoints that a run keeps: both encoders, momentum and queues in float32."""
    return recipe.train.keep_checkpoints * (3 * size.parameters + _queued(recipe)) * 4 / _GIB


def memory_gib(recipe: PretrainRecipe, size: NetworkSize, device: torch.device) -> float:
    """Peak memory of a process on its device; on a CPU, with its loader processes."""
    bytes_each = 4 if recipe.train.precision == "float32" else 2
    images = recipe.data.batch_size / recipe.train.accumulate
    activations = size.activations * images * bytes_each / 4
    if recipe.train.activation_checkpointing:
        activations /= 4
    state = (_COPIES * size.parameters + _queued(recipe)) * 4
    loaders = recipe.data.workers * LOADER_BYTES if device.type == "cpu" else 0
    return (_PROCESS[device.type] + state + activations + loaders) / _GIB


def estimate_run(
    recipe: PretrainRecipe, steps: int, device: torch.device, processes: int = 1
) -> Estimate:
    """The estimate for `steps` steps. processes: equal devices that share the batch."""
    size = network_size(recipe)
    directions = 2 if recipe.method.symmetric else 1
    operations = directions * (_PASSES * size.operations + _loss_operations(recipe))
    rate = matrix_rate(device, getattr(torch, recipe.train.precision))
    images_per_second = processes * rate * _UTILISATION[device.type] / operations
    hours = steps * recipe.data.batch_size / images_per_second / 3600
    memory = memory_gib(_share(recipe, processes), size, device)
    return Estimate(images_per_second, hours, memory, disk_gib(recipe, size))


def _share(recipe: PretrainRecipe, processes: int) -> PretrainRecipe:
    """The recipe with one process's share of the batch."""
    share = {"batch_size": recipe.data.batch_size // processes}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=share)})


def estimate_warnings(found: Estimate, device: torch.device) -> list[str]:
    """In plain words, what is absurd about a run on this device."""
    warnings = []
    if found.hours > _LONG_HOURS:
        warnings.append(
            f"this run would take about {describe_hours(found.hours)} on this device "
            f"({found.images_per_second:.3g} images/s). `dupr plan SHARDS --hours 12` proposes a "
            f"recipe that fits the time and the machine."
        )
    if found.memory_gib > device_memory_bytes(device) / _GIB:
        warnings.append(_too_large(found.memory_gib, device))
    return warnings


def require_memory(recipe: PretrainRecipe, device: torch.device, processes: int) -> None:
    """Raises UsageError for a run that cannot fit, before it makes the machine unusable."""
    needed = memory_gib(_share(recipe, processes), network_size(recipe), device)
    if needed > _CERTAINLY * device_memory_bytes(device) / _GIB:
        raise UsageError(_too_large(needed, device))


def _too_large(needed: float, device: torch.device) -> str:
    return (
        f"this run would need about {needed:.0f} GiB of memory, and there are "
        f"{device_memory_bytes(device) / _GIB:.0f}. Use a smaller data.batch_size, "
        f"method.queue_length or method.views.size, fewer data.workers, or train.accumulate."
    )


def _queued(recipe: PretrainRecipe) -> int:
    """Numbers in all queues."""
    method = recipe.method
    queues = sum(bool(w) for part in (method.image, method.patch) for w in part.weights.values())
    return queues * method.queue_length * method.embedding_dim


def _loss_operations(recipe: PretrainRecipe) -> float:
    """Of one image's contrast with the queues: similarities, and the weighted keys."""
    method = recipe.method
    queries = sum(bool(w) for w in method.image.weights.values())
    queries += sum(method.patch.bins[v] ** 2 for v, w in method.patch.weights.items() if w)
    return 4.0 * queries * method.queue_length * method.embedding_dim
