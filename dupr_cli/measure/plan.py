"""A proposal for some shards, a machine and a detector: the measurement behind `dupr plan`.

The rules that choose values are those of docs/method.md and of the warnings about recipes; the time
comes from real steps on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml

from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.datasets.pixels import IMAGE_ERRORS
from dupr_cli.errors import UsageError
from dupr_cli.measure.bench import suggest_workers
from dupr_cli.measure.costs import (
    affordable,
    measure_loader,
    measure_step,
    measure_training,
    whole_memory_gib,
)
from dupr_cli.pretrain import plan as check
from dupr_cli.pretrain.data import BatchOrder, decode
from dupr_cli.pretrain.estimate import (
    Estimate,
    describe_hours,
    disk_gib,
    estimate_warnings,
    memory_gib,
    network_size,
)
from dupr_cli.pretrain.recipe_checks import (
    LARGEST_QUEUE,
    PUBLISHED_BLUR,
    science_warnings,
)
from dupr_cli.pretrain.trainer import count_steps
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    Overrides,
    PretrainRecipe,
    as_address,
    load_recipe,
    resolve_recipe,
)
from dupr_cli.recipe.base import LEVEL_STRIDES
from dupr_cli.recipe.given import as_overrides
from dupr_cli.runtime.devices import choose_device
from dupr_cli.runtime.machine import device_memory_bytes, device_name

# The backbone that the pages under docs/detectors load into each detector.
DETECTORS = {
    "torchvision": "resnet50",
    "detectron2": "resnet50",
    "mmdetection": "resnet50",
    "detr": "resnet50",
    "rt-detr-r18": "transformers:rt_detr_resnet18",
    "rt-detr-r34": "transformers:rt_detr_resnet34",
    "rt-detr-r50": "transformers:rt_detr_resnet50",
    "d-fine-n": "transformers:hgnetv2_b0",
    "d-fine-s": "transformers:hgnetv2_b0",
    "d-fine-m": "transformers:hgnetv2_b2",
    "d-fine-l": "transformers:hgnetv2_b4",
}
# From this many images on, the values of ImageNet suit a GPU; below, those of small sets.
_MANY_IMAGES = 300_000
_LOOKED_AT = 64  # images whose size is read
_LARGEST_VIEW = {"cpu": 64, "cuda": 224}
_LONGEST_QUEUE = 65_536
# The key encoder's momentum by the length of the run, so that it is not left at its start.
_MOMENTA = ((3_000, 0.99), (50_000, 0.996))
_LONG_MOMENTUM = 0.999
_MOST_MEMORY = 0.8  # of the device
_SHORTEST_STEPS = 100
_FEWEST_STEPS_PER_EPOCH = 8
_CPU_EPOCHS = 30
# Share of the given time for steps; the rest is for checkpoints and measurements of retrieval.
_TIME_FOR_STEPS = 0.93
_CHECKPOINT_SECONDS = 900
_STEP_SECONDS = {"cpu": 1.5, "cuda": 3.0}
# A precision must be this much faster than float32 to be proposed.
_CLEARLY_FASTER = 1.1


@dataclass(frozen=True)
class Choice:
    """A recipe key, the value proposed for it, and why."""

    key: str
    value: object
    why: str


@dataclass(frozen=True)
class Proposal:
    """What `dupr plan` proposes. base: the shipped recipe that it changes. keys: the changes.
    images: to train on. shorter_side: median of the images, in pixels. written: the recipe file."""

    data: str
    images: int
    shorter_side: int
    device: str
    base: str
    keys: list[Choice]
    steps: int
    epochs: float
    estimate: Estimate
    warnings: list[str]
    written: str | None = None


def propose(
    data: str | Path,
    *,
    recipe: str | Path | None = None,
    detector: str | None = None,
    hours: float | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    seconds: float = 20.0,
    write: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Proposal:
    """Propose a recipe for these shards on this machine, with its time measured.

    recipe: to start from; its values stay, except those that do not fit. detector: one of
    `DETECTORS`. hours: that the run may take. seconds: of the measurement, about. write: file for
    the recipe. overwrite: replace it. Raises UsageError for an unknown detector, a `write` that
    exists otherwise, and whatever `pretrain.plan` refuses.
    """
    reporter, write = reporter or SilentReporter(), Path(write) if write is not None else None
    if detector is not None and detector not in DETECTORS:
        raise UsageError(f"--detector {detector}: use one of {', '.join(DETECTORS)}.")
    if write is not None and write.exists() and not overwrite:
        raise UsageError(
            f"--write {write} exists already; give the name of a new file, or --overwrite."
        )
    chosen = choose_device(device)
    base = _base(data, chosen) if recipe is None else str(recipe)
    if Path(base).is_file():
        base = str(Path(base).resolve())  # the recipe that extends it may lie elsewhere
    draft = _Draft(base, overrides)
    shards = open_shards(as_address(data, "data"), draft.recipe.data.split)
    side = _shorter_side(shards)
    _fit_data(draft, shards, side, chosen, free=recipe is None)
    if detector is not None and draft.recipe.model.backbone != DETECTORS[detector]:
        draft.set("model.backbone", DETECTORS[detector], f"what {detector} uses")
    _fit_memory(draft, chosen)
    check(draft.recipe, data, Path("a new run"), device, overwrite=True)

    size = network_size(draft.recipe)
    with reporter.task("plan", 3, "measurements") as task:
        if recipe is None:
            task.advance(0, "times steps in float32 and bfloat16")
            _choose_precision(draft, shards, chosen, seconds / 4)
        task.advance(1, f"times steps from memory  precision {draft.recipe.train.precision}")
        measured = affordable(draft.recipe, chosen, size, _STEP_SECONDS[chosen.type])
        loader = measure_loader(shards, draft.recipe, seconds / 8)
        step = measure_step(shards, measured, chosen, seconds / 4)
        batch = draft.recipe.data.batch_size
        from_memory = step.images_per_second(batch)
        task.advance(1, f"times training from the shards  {from_memory:.3g} images/s from memory")
        workers = suggest_workers(from_memory, loader, chosen)
        if workers != draft.recipe.data.workers:
            draft.set(
                "data.workers", workers,
                f"one loads {loader.images_per_second:.0f} images/s",
            )  # fmt: skip
            measured = affordable(draft.recipe, chosen, size, _STEP_SECONDS[chosen.type])
        training = measure_training(shards, measured, chosen, seconds / 3)
        # The loader's share of what was measured, and the steps at the size of the whole batch.
        slowed = (training.seconds / training.images) / (step.seconds / step.images)
        rate = from_memory / max(1.0, slowed)
        task.advance(1, f"{rate:.3g} images/s from the shards")
    images = BatchOrder(shards, draft.recipe).images
    _fit_time(draft, images, rate, hours, recipe is None, chosen)
    final = draft.recipe
    steps = count_steps(final, images)
    expected = Estimate(
        images_per_second=rate,
        hours=steps * batch / rate / 3600,
        memory_gib=whole_memory_gib(training, measured, final, chosen, size),
        disk_gib=disk_gib(final, size),
        measured=True,
    )
    proposal = Proposal(
        data=str(data),
        images=images,
        shorter_side=side,
        device=device_name(chosen),
        base=base,
        keys=draft.choices(),
        steps=steps,
        epochs=round(steps * batch / images, 1),
        estimate=expected,
        warnings=[
            *science_warnings(final, images, steps),
            *estimate_warnings(expected, chosen),
        ],
        written=str(write) if write else None,
    )
    if write is not None:
        write_text(write, recipe_text(proposal, write))
        load_recipe(PretrainRecipe, str(write))  # what is proposed can be run
    return proposal


def recipe_text(proposal: Proposal, file: Path) -> str:
    """The proposal as a recipe file: the reasons as comments, and the keys that differ."""
    lines = [
        f"# Proposed by `dupr plan` for {proposal.images:,} images of {proposal.data}.",
        f"#   dupr pretrain {file} --data {proposal.data} --out RUN",
        f"# Source of the values: {proposal.base}, changed for these images and this machine:",
        *(f"#   {choice.key}: {choice.why}" for choice in proposal.keys),
        f"# Cost on {proposal.device}: {proposal.estimate}.",
    ]
    values: dict[str, object] = {"stage": "pretrain", "extends": proposal.base}
    for choice in proposal.keys:
        place = values
        *sections, name = choice.key.split(".")
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[name] = choice.value
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)


class _Draft:
    """A recipe while its values are chosen. What the user gave stays."""

    def __init__(self, base: str, overrides: Overrides) -> None:
        self._base = base
        given = as_overrides(overrides)
        self._given = {option.key for option in given}
        self._choices = {o.key: Choice(o.key, o.value, "as given") for o in given}

    @property
    def recipe(self) -> PretrainRecipe:
        changes = {choice.key: choice.value for choice in self._choices.values()}
        return resolve_recipe(PretrainRecipe, self._base, changes)

    def set(self, key: str, value: object, why: str) -> None:
        """Choose a value; a later choice replaces an earlier one."""
        if key not in self._given:
            self._choices[key] = Choice(key, value, why)

    def choices(self) -> list[Choice]:
        return list(self._choices.values())


def _base(data: str | Path, device: torch.device) -> str:
    if device.type == "cpu":
        return "dupr-r18-cpu-smoke"
    images = len(open_shards(as_address(data, "data")))
    return "dupr-r50-single-gpu" if images >= _MANY_IMAGES else "dupr-r18-small-data"


def _shorter_side(shards: ShardSet) -> int:
    """Median of the images' shorter sides, of images spread over all shards."""
    sides = []
    for number in np.linspace(0, len(shards) - 1, min(_LOOKED_AT, len(shards))).astype(int):
        try:
            image = decode(shards[int(number)])
        except IMAGE_ERRORS:
            continue
        sides.append(min(image.width, image.height))
    if not sides:
        raise UsageError(
            f"{shards.name}: none of the images that were tried can be decoded. `dupr prepare` "
            f"skips such images."
        )
    return int(median(sides))


def _fit_data(draft: _Draft, shards: ShardSet, side: int, device: torch.device, free: bool) -> None:
    """Views, batch and queue for these images. free: whether the recipe's own may be replaced."""
    base = draft.recipe
    images = len(shards) - min(base.data.holdout, len(shards) // 10)
    if free:
        _fit_views(draft, side, device)
    batch, groups = base.data.batch_size, base.method.batch_norm.groups
    if free and batch > images // _FEWEST_STEPS_PER_EPOCH:
        fitting = max(2 * groups, _power_of_two(images // _FEWEST_STEPS_PER_EPOCH))
        if fitting < batch:
            why = f"{images:,} images give {images // fitting} steps in an epoch"
            draft.set("data.batch_size", fitting, why)
            lr = float(f"{base.optimizer.lr * fitting / batch:.2g}")
            draft.set("optimizer.lr", lr, "in proportion to the batch")
    batch = draft.recipe.data.batch_size
    directions = 2 if base.method.symmetric else 1
    most = min(_LONGEST_QUEUE, int(images * LARGEST_QUEUE * directions))
    keys = batch * directions  # that enter in a step
    queue = max(keys, _power_of_two(most) // keys * keys)
    if queue < base.method.queue_length or (free and queue != base.method.queue_length):
        why = f"at most a quarter of {images:,} images, so that few negatives are the image itself"
        draft.set("method.queue_length", queue, why)


def _fit_views(draft: _Draft, side: int, device: torch.device) -> None:
    base = draft.recipe
    largest = _LARGEST_VIEW[device.type]
    size = min(largest, max(32, side // 32 * 32))
    if size == base.method.views.size:
        return
    reason = f"the images' shorter side is {side}" if size < largest else "what the device affords"
    draft.set("method.views.size", size, reason)
    draft.set("method.augmentation.blur.sigma", [0.1, max(0.2, round(PUBLISHED_BLUR * size, 1))],
              "MoCo's 2.0 at 224 pixels, in proportion")  # fmt: skip
    for level in base.method.patch.bins:
        bins = max(1, size // LEVEL_STRIDES[level])
        draft.set(f"method.patch.bins.{level}", bins, "one for each cell across a view")


def _fit_memory(draft: _Draft, device: torch.device) -> None:
    """Cut the batch into parts until it fits."""
    size = network_size(draft.recipe)
    room = _MOST_MEMORY * device_memory_bytes(device) / 2**30
    while (needed := memory_gib(draft.recipe, size, device)) > room:
        parts = 2 * draft.recipe.train.accumulate
        if draft.recipe.method.batch_norm.groups % parts:
            break  # the estimate warns
        draft.set("train.accumulate", parts, f"the whole batch would need {needed:.0f} GiB")


def _choose_precision(
    draft: _Draft, shards: ShardSet, device: torch.device, seconds: float
) -> None:
    """Take bfloat16 where real steps are clearly faster with it."""
    rates = {}
    for precision in ("float32", "bfloat16"):
        train = draft.recipe.train.model_copy(update={"precision": precision})
        recipe = draft.recipe.model_copy(update={"train": train})
        size = network_size(recipe)
        recipe = affordable(recipe, device, size, _STEP_SECONDS[device.type] / 2)
        step = measure_step(shards, recipe, device, seconds / 2)
        rates[precision] = step.images_per_second(recipe.data.batch_size)
    chosen = "bfloat16" if rates["bfloat16"] > _CLEARLY_FASTER * rates["float32"] else "float32"
    if chosen != draft.recipe.train.precision:
        why = f"{rates['bfloat16']:.3g} images/s, and {rates['float32']:.3g} in float32"
        draft.set("train.precision", chosen, why)


def _fit_time(
    draft: _Draft, images: int, rate: float, hours: float | None, free: bool, device: torch.device
) -> None:
    """Length and what depends on it. rate: images/s."""
    base = draft.recipe
    batch = base.data.batch_size
    if hours is not None:
        steps = int(_TIME_FOR_STEPS * hours * 3600 * rate / batch)
        if steps < _SHORTEST_STEPS:
            raise UsageError(
                f"--hours {hours:g}: only {steps} steps of {batch} images fit in it at {rate:.3g} "
                f"images/s, and no run of fewer than {_SHORTEST_STEPS} is of use. Give at least "
                f"{_SHORTEST_STEPS * batch / rate / 3600 / _TIME_FOR_STEPS:.2g} hours."
            )
        if base.train.epochs is not None:
            draft.set("train.epochs", None, "train.steps counts")
        draft.set("train.steps", steps, f"fits in {describe_hours(hours)} at {rate:.3g} images/s")
    elif free and device.type == "cpu":
        steps = max(_SHORTEST_STEPS, round(_CPU_EPOCHS * images / batch))
        draft.set("train.steps", steps, f"{_CPU_EPOCHS} epochs; --hours sets another length")
    else:
        steps = count_steps(base, images)
    if not free:
        return
    momentum = next((m for limit, m in _MOMENTA if steps < limit), _LONG_MOMENTUM)
    if momentum != base.method.momentum:
        draft.set("method.momentum", momentum, f"the key encoder must follow in {steps:,} steps")
    if base.optimizer.warmup_steps > steps // 10:
        draft.set("optimizer.warmup_steps", steps // 10, "a tenth of the run")
    every = max(50, int(_CHECKPOINT_SECONDS * rate / batch))
    draft.set("train.checkpoint_every", every, "about a quarter of an hour")
    draft.set("train.probe_every", max(50, steps // 20), "twenty measurements in the run")


def _power_of_two(most: int) -> int:
    """The largest power of two that is at most `most`, at least 1."""
    return 1 << max(1, most).bit_length() - 1
