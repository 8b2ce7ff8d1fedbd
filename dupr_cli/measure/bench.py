"""What bounds a recipe on this machine, and by how much: the measurement behind `dupr bench`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dupr_cli.artifacts.shards import open_shards
from dupr_cli.measure.costs import (
    LoaderCost,
    StepCost,
    affordable,
    measure_loader,
    measure_step,
    measure_training,
)
from dupr_cli.pretrain.estimate import network_size
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import Overrides, PretrainRecipe, as_address, resolve_recipe
from dupr_cli.runtime.devices import choose_device
from dupr_cli.runtime.machine import cores, device_name, matrix_rate

# Steps that wait longer than this share of the time are bound by the loader.
_WAITING = 0.1
# Longest step that is measured; a batch that would take longer is measured in part.
_STEP_SECONDS = {"cpu": 1.5, "cuda": 3.0}
# The phases of a loader process, in the words of advice.
_LOADER_WORDS = {"read": "reading the shards", "decode": "decoding", "crop": "cropping"}
_BACKBONE = "backbone"
_ADVICE = {
    _BACKBONE: "The network itself is the bound: smaller views, train.precision, or a faster "
    "device.",
    "augment": "The colour changes take most of a step: leave out some of method.augmentation, or "
    "use a faster device for them.",
}


@dataclass(frozen=True)
class Part:
    """One part of a step. milliseconds: of a step with all measured images."""

    name: str
    milliseconds: float


@dataclass(frozen=True)
class BenchResult:
    """What `dupr bench` measured.

    measured_images: of each measured step, which may be fewer than `batch`. loader: images/s of one
    process by phase, and of all its phases. from_memory, from_shards, bare: images/s of training
    without and with the loader, and of the bare backbone. overhead: time of a step from memory over
    that of the bare backbone. waited: share of the time that steps waited for data. parts: of a
    step, exclusive, slowest first. utilisation: operations of the backbone at the rate of
    `from_memory` over `matrix_rate`, the operations per second of large matrix products. bound: the
    part to look at first. advice: what to do about it.
    """

    recipe: str
    data: str
    device: str
    batch: int
    measured_images: int
    workers: int
    suggested_workers: int
    loader: dict[str, float]
    bare: float
    from_memory: float
    from_shards: float
    overhead: float
    waited: float
    parts: list[Part]
    matrix_rate: float
    utilisation: float
    memory_gib: float
    bound: str
    advice: str
    picture: str | None = None


def bench(
    recipe: PretrainRecipe | str | Path,
    data: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    seconds: float = 20.0,
    picture: Path | None = None,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Measure the parts of a recipe on this machine, each alone and then together.

    seconds: of the measurement, about; a slow network takes at least a few steps. picture: PNG to
    write. Raises UsageError as `pretrain.plan` does, and RunError when images cannot be read.
    """
    reporter = reporter or SilentReporter()
    resolved = resolve_recipe(PretrainRecipe, recipe, overrides)
    shards = open_shards(as_address(data, "data"), resolved.data.split)
    chosen = choose_device(device)
    size = network_size(resolved)
    measured = affordable(resolved, chosen, size, _STEP_SECONDS[chosen.type])
    images, workers = measured.data.batch_size, resolved.data.workers
    with reporter.task("bench", 3, "measurements") as task:
        task.advance(0, "loads images")
        loader = measure_loader(shards, resolved, seconds / 5)
        loads = f"{loader.images_per_second:.0f} images/s loaded by one process"
        task.advance(1, f"times steps from memory  {loads}")
        step = measure_step(shards, measured, chosen, 2 * seconds / 5)
        from_memory = images / step.seconds
        task.advance(1, f"times training from the shards  {from_memory:.0f} images/s from memory")
        training = measure_training(shards, measured, chosen, 2 * seconds / 5)
        task.advance(1, f"{training.images / training.seconds:.0f} images/s from the shards")
    rate = matrix_rate(chosen, getattr(torch, resolved.train.precision))
    parts = _parts(step)
    suggested = suggest_workers(from_memory, loader, chosen)
    bound, advice = _bound(parts, loader, training.waited, workers, suggested)
    result = BenchResult(
        recipe=str(recipe) if isinstance(recipe, str | Path) else resolved.description,
        data=shards.name,
        device=device_name(chosen),
        batch=resolved.data.batch_size,
        measured_images=images,
        workers=workers,
        suggested_workers=suggested,
        loader={
            **{name: 1 / value for name, value in loader.seconds.items()},
            "all": loader.images_per_second,
        },
        bare=images / step.bare,
        from_memory=from_memory,
        from_shards=training.images / training.seconds,
        overhead=step.seconds / step.bare,
        waited=training.waited,
        parts=parts,
        matrix_rate=rate,
        utilisation=step.operations * from_memory / rate,
        memory_gib=training.memory_gib,
        bound=bound,
        advice=advice,
        picture=str(picture) if picture else None,
    )
    if picture is not None:
        from dupr_cli.measure.picture import draw_bench

        draw_bench(result, picture)
    return result


def suggest_workers(rate: float, loader: LoaderCost, device: torch.device) -> int:
    """Loader processes that keep up with `rate` images/s.

    On a CPU they share the cores with the steps, so one that keeps up by itself is enough.
    """
    wanted = max(1, math.ceil(1.2 * rate / loader.images_per_second))
    return min(wanted, max(1, cores() - (device.type == "cuda")))


def _parts(step: StepCost) -> list[Part]:
    """The step's parts, slowest first: the bare backbone, and what the method adds to it.

    The passes through both encoders hold the backbone's; what they take beyond it is batch norm in
    groups and the gradients of heads and patches.
    """
    passes = ("query forward", "key forward", "backward")
    within = sum(step.phases.get(name, 0.0) for name in passes)
    found = {name: value for name, value in step.phases.items() if name not in passes}
    found[_BACKBONE] = min(step.bare, within)
    found["passes beyond the backbone"] = max(0.0, within - step.bare)
    parts = [Part(name, 1000 * value) for name, value in found.items() if value > 0]
    return sorted(parts, key=lambda part: -part.milliseconds)


def _bound(
    parts: list[Part], loader: LoaderCost, waited: float, workers: int, suggested: int
) -> tuple[str, str]:
    """The part to look at first, and what to do. Waiting for data counts as a part of a step."""
    share = parts[0].milliseconds / sum(part.milliseconds for part in parts)
    waiting = ""
    if waited > _WAITING:
        slowest = max(loader.seconds, key=lambda name: loader.seconds[name])
        words = _LOADER_WORDS[slowest]
        waiting = f"Steps wait {waited:.0%} of the time for data, and most of it goes to {words}. "
        if suggested > workers:
            waiting += f"Use --workers {suggested}. "
        elif slowest == "read":
            waiting += "Copy the shards to a local disk. "
        else:
            waiting += "Make smaller images in `dupr prepare` (image.min_side), or use more cores. "
        if waited > share * (1 - waited):
            return words, waiting.strip()
    return parts[0].name, waiting + _ADVICE.get(
        parts[0].name, f"Most of a step goes to {parts[0].name}."
    )
