"""Times of a recipe's parts on this machine: the loader, a step from memory, and both together.

All are measured with a part of the batch where the whole would take too long, in batch-norm groups
of the same size. What a step costs for each image grows with the batch, what it costs once does
not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import torch

from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.errors import RunError
from dupr_cli.models.backbone import make_backbone
from dupr_cli.pretrain.data import BatchOrder, ViewPairs, training_batches
from dupr_cli.pretrain.estimate import NetworkSize, estimate_run, memory_gib, network_size
from dupr_cli.pretrain.step import Training, autocast, memory_format
from dupr_cli.pretrain.trainer import timed
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.runtime.machine import device_memory_bytes, peak_memory_bytes
from dupr_cli.runtime.parallel import World
from dupr_cli.runtime.phases import PhaseTimes
from dupr_cli.views.pairs import ViewPairBatch

# Phases whose time does not depend on the number of images in the step.
ONCE_PER_STEP = frozenset(
    {"momentum update", "average gradients", "gradient check", "optimizer", "batch-norm statistics"}
)
_FEWEST_ROUNDS = 3
_WARM_UP = 2
# Share of the device's memory that a measurement may need.
_ROOM = 0.7
_SCHEDULE = 10_000  # steps that the schedules of a measurement span


@dataclass(frozen=True)
class LoaderCost:
    """Seconds for each image in one process, by phase: read, decode, crop."""

    seconds: dict[str, float]

    @property
    def images_per_second(self) -> float:
        return 1 / sum(self.seconds.values())


@dataclass(frozen=True)
class StepCost:
    """Of a step with `images` images that are already in memory.

    seconds: median of whole steps. bare: of the backbone's query forward and backward pass and key
    forward pass alone, with plain batch norm, measured in turn with the steps. phases: mean
    seconds. operations: of the backbone, for each image of a step.
    """

    images: int
    seconds: float
    bare: float
    phases: dict[str, float]
    operations: float

    def images_per_second(self, batch: int) -> float:
        """From memory, with steps of `batch` images."""
        once = sum(self.phases.get(name, 0.0) for name in ONCE_PER_STEP)
        return batch / (once + (self.seconds - once) * batch / self.images)


@dataclass(frozen=True)
class TrainingCost:
    """Of training from the shards. waited: share of the time that steps waited for their batch.
    memory_gib: peak of this process on its device; on a CPU, of all processes."""

    images: int
    seconds: float
    waited: float
    memory_gib: float


def reduced(recipe: PretrainRecipe, images: int) -> PretrainRecipe:
    """The recipe with steps of about `images` images, and batch-norm groups of the same size."""
    batch, groups = recipe.data.batch_size, recipe.method.batch_norm.groups
    if images >= batch:
        return recipe
    group = max(1, batch // groups)
    groups = max(1, images // group)
    size = groups * min(group, max(2, images))  # batch norm needs two
    norm = recipe.method.batch_norm.model_copy(update={"groups": groups})
    return recipe.model_copy(
        update={
            "method": recipe.method.model_copy(update={"batch_norm": norm}),
            "data": recipe.data.model_copy(update={"batch_size": size}),
            "train": recipe.train.model_copy(update={"accumulate": 1}),
        }
    )


def affordable(
    recipe: PretrainRecipe, device: torch.device, size: NetworkSize, seconds: float
) -> PretrainRecipe:
    """The recipe with as much of its batch as a step of about `seconds` and the memory allow."""
    rate = estimate_run(recipe, 1, device).images_per_second
    images = min(recipe.data.batch_size // recipe.train.accumulate, max(1, int(rate * seconds)))
    found = reduced(recipe, images)
    room = _ROOM * device_memory_bytes(device) / 2**30
    while found.data.batch_size > 2 and memory_gib(found, size, device) > room:
        found = reduced(found, found.data.batch_size // 2)
    return found


def measure_loader(shards: ShardSet, recipe: PretrainRecipe, seconds: float) -> LoaderCost:
    """Read, decode and crop images in this process for about `seconds`."""
    read = ViewPairs(shards, recipe.method, recipe.seed)
    requests = (request for batch in BatchOrder(shards, recipe) for request in batch)
    read(next(requests))  # opens the files
    times = PhaseTimes(torch.device("cpu"))
    images, until = 0, time.perf_counter() + seconds
    with times:
        while time.perf_counter() < until or not images:
            read(next(requests))
            images += 1
    return LoaderCost({name: value / images for name, value in times.seconds.items()})


def measure_step(
    shards: ShardSet, recipe: PretrainRecipe, device: torch.device, seconds: float
) -> StepCost:
    """Steps of the recipe and of its bare backbone in turn, on one batch, for about `seconds`."""
    world = World(device)
    read = ViewPairs(shards, recipe.method, recipe.seed)
    batch = ViewPairBatch.stack([read(r) for r in next(iter(BatchOrder(shards, recipe)))])
    training = Training(recipe, _SCHEDULE, world)
    bare = _bare_steps(recipe, batch, world)
    times = PhaseTimes(device)
    for number in range(_WARM_UP):
        training.step(number, batch)
        next(bare)
    whole: list[float] = []
    alone: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(whole) < _FEWEST_ROUNDS:
        start = times.now()
        training.step(_WARM_UP + len(whole), batch)
        whole.append(times.now() - start)
        alone.append(next(bare))
    # Apart from the times above: waiting for the device at every phase slows a step.
    with times:
        for number in range(_FEWEST_ROUNDS):
            training.step(number, batch)
    phases = {name: value / _FEWEST_ROUNDS for name, value in times.seconds.items()}
    images = recipe.data.batch_size
    return StepCost(
        images, median(whole), median(alone), phases, 4 * network_size(recipe).operations
    )


def _bare_steps(recipe: PretrainRecipe, batch: ViewPairBatch, world: World) -> Iterator[float]:
    """Endless seconds of steps of the backbone alone, at the size and precision of the recipe."""
    method, train = recipe.method, recipe.train
    levels = method.levels
    layout = memory_format(recipe)
    query, key = (
        make_backbone(recipe.model.backbone, method.augmentation.channels)
        .to(world.device)
        .to(memory_format=layout)
        .train()
        for _ in range(2)
    )
    if train.compile:
        query.compile()
        key.compile()
    shape = batch.views[:, 0].shape
    views = torch.rand(shape, device=world.device).contiguous(memory_format=layout)
    clock = PhaseTimes(world.device)
    while True:
        start = clock.now()
        with torch.no_grad(), autocast(recipe, world):
            key(views, levels, levels[-1])
        with autocast(recipe, world):
            maps = query(views, levels, levels[-1])
        torch.autograd.backward(torch.stack([maps[v].float().mean() for v in levels]).sum())
        query.zero_grad(set_to_none=True)
        yield clock.now() - start


def measure_training(
    shards: ShardSet, recipe: PretrainRecipe, device: torch.device, seconds: float
) -> TrainingCost:
    """Train from the shards, loader processes included, for about `seconds`.

    The first steps take batches that were loaded while the processes started; they do not count.
    """
    world = World(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = Training(recipe, _SCHEDULE, world)
    clock = PhaseTimes(device)
    loader, _ = training_batches(shards, recipe, 0, world)
    steps, waits = 0, 0.0
    with closing(loader):
        batches = timed(loader)
        start = until = clock.now()
        for number, (batch, waited) in enumerate(batches):
            if not training.step(number, batch).finite:
                raise RunError(
                    "the loss is not finite in a measured step; lower optimizer.lr or use "
                    "train.precision: float32."
                )
            if number + 1 == _WARM_UP:
                start = clock.now()
                until = start + seconds
            elif number + 1 > _WARM_UP:
                steps, waits = steps + 1, waits + waited
                if steps >= _FEWEST_ROUNDS and clock.now() >= until:
                    break
        elapsed = clock.now() - start
    images = steps * recipe.data.batch_size
    memory = _peak_gib(device, recipe.data.workers)
    return TrainingCost(images, elapsed, waits / elapsed, memory)


def _peak_gib(device: torch.device, workers: int) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return (peak_memory_bytes() + workers * peak_memory_bytes(of_children=True)) / 2**30


def whole_memory_gib(
    measured: TrainingCost, measured_with: PretrainRecipe, recipe: PretrainRecipe,
    device: torch.device, size: NetworkSize,
) -> float:  # fmt: skip
    """Memory of the whole recipe, from what a part of its batch took."""
    difference = memory_gib(recipe, size, device) - memory_gib(measured_with, size, device)
    return measured.memory_gib + difference
