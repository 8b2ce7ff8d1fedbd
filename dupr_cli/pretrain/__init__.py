"""Stage 2, `dupr pretrain`: shards and a recipe to a run directory with checkpoints.

step.py holds the method and reads from top to bottom, and trainer.py the loop around it; the views,
geometry, losses, queues and checkpoints that they call are modules of their own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

from dupr_cli.artifacts.files import write_text
from dupr_cli.artifacts.pixel_formats import counted, described
from dupr_cli.artifacts.run import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    MetricsLog,
    newest_checkpoint,
    read_environment,
    training_files,
    write_environment,
)
from dupr_cli.artifacts.shards import ShardSet, open_shards
from dupr_cli.artifacts.weights import layout_of
from dupr_cli.errors import UsageError
from dupr_cli.models.backbone import make_backbone, require_fit, require_levels
from dupr_cli.models.published import open_weights
from dupr_cli.parsing import ParseError, read_yaml
from dupr_cli.pretrain.data import BatchOrder
from dupr_cli.pretrain.estimate import estimate_run, estimate_warnings, require_memory
from dupr_cli.pretrain.method import method_class
from dupr_cli.pretrain.recipe_checks import science_warnings
from dupr_cli.pretrain.trackers import require_trackers
from dupr_cli.pretrain.trainer import count_steps, train
from dupr_cli.pretrain.types import PretrainPlan, PretrainResult
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    Overrides,
    PretrainRecipe,
    as_address,
    as_path,
    recipe_keys,
    recipe_yaml,
    resolve_recipe,
)
from dupr_cli.runtime.devices import choose_device
from dupr_cli.runtime.output import differences, environment, holds, remove, writing
from dupr_cli.runtime.parallel import join, world_size
from dupr_cli.runtime.stopping import Limits, stoppable
from dupr_cli.views.augmentation import uses_rgb

# Keys that change how a run is carried out, not what it computes.
OPERATIONAL_KEYS = frozenset(
    {
        "description",
        "data.workers",
        "train.log_every",
        "train.probe_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.max_bad_steps",
    }
)
# These keep the computation but change its rounding: free to change, but not bit for bit.
ROUNDING_KEYS = frozenset(
    {
        "train.accumulate",
        "train.activation_checkpointing",
        "train.channels_last",
        "train.compile",
    }
)


def plan(
    recipe: PretrainRecipe | str | Path,
    data: str | Path,
    out: str | Path,
    device: str = "auto",
    processes: int = 1,
    *,
    overrides: Overrides = (),
    overwrite: bool = False,
    allow_changed: Collection[str] = (),
    track: Sequence[str] = (),
) -> PretrainPlan:
    """Check everything that `run` needs and return its plan. Nothing is changed.

    Raises UsageError as `run` does.
    """
    recipe = resolve_recipe(PretrainRecipe, recipe, overrides)
    data, out = as_address(data, "data"), as_path(out, "out")

    require_trackers(track)
    _require_fit(recipe, processes)
    _require_parts(recipe)
    _require_init(recipe)
    shards = open_shards(data, recipe.data.split)
    shards.require_indexes()  # a run would find a damaged one when it reaches its shard
    _require_channels(recipe, shards)
    if not overwrite:
        _check_claim(recipe, shards, out, allow_changed, SilentReporter())
    order = BatchOrder(shards, recipe)
    steps = count_steps(recipe, order.images)
    chosen = choose_device(device)
    expected = estimate_run(recipe, steps, chosen, processes)
    return PretrainPlan(
        data=data,
        images=order.images,
        held_out=len(shards) - order.images,
        steps=steps,
        epochs=round(steps * recipe.data.batch_size / order.images, 2),
        device=str(chosen),
        processes=processes,
        images_per_process=recipe.data.batch_size // processes,
        estimate=expected,
        warnings=[
            *science_warnings(recipe, order.images, steps),
            *estimate_warnings(expected, chosen),
        ],
        out=str(out),
    )


def run(
    recipe: PretrainRecipe | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    allow_changed: Collection[str] = (),
    max_hours: float | None = None,
    stop_after: int | None = None,
    track: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> PretrainResult | None:
    """Pre-train, or continue the run in `out` from its newest whole checkpoint.

    Under torchrun every process calls this; the first returns the result and the others None.

    recipe, overrides: see `dupr_cli.recipe.given`. data: shards, see `open_shards`. device: auto,
    cpu, cuda or cuda:N. allow_changed: recipe keys that may differ from those of the run in `out`.
    max_hours, stop_after: save and stop when this call has run that long or made that many steps.
    track: trackers that get the metrics too, NAME or NAME:PROJECT each.
    Raises UsageError when the run needs several times the memory that is there, or when `out` holds
    something else or a run of another recipe or other data; RunError and StoppedRunError as
    `trainer.train`.
    """

    recipe = resolve_recipe(PretrainRecipe, recipe, overrides)
    data, out = as_address(data, "data"), as_path(out, "out")
    require_trackers(track)
    _require_fit(recipe, world_size())
    _require_parts(recipe)
    if overwrite or not (out / RECIPE_FILE).is_file():
        _require_init(recipe)
    with stoppable("The same command continues."), join(device) as world:
        reporter = reporter if reporter and world.is_main else SilentReporter()
        shards = open_shards(data, recipe.data.split)
        _require_channels(recipe, shards)
        require_memory(recipe, world.device, world.size)
        with writing(out, "dupr pretrain") if world.is_main else nullcontext():
            if world.is_main:
                _claim(recipe, shards, out, overwrite, allow_changed, reporter)
                images = len(shards) - min(recipe.data.holdout, len(shards) // 10)
                for warning in science_warnings(recipe, images, count_steps(recipe, images)):
                    reporter.warning(warning)
                if shards.pixels is not None and uses_rgb(recipe.method.augmentation):
                    reporter.info(
                        f"{shards.name}: {described(shards.pixels)} have no saturation, hue or "
                        f"grayscale: these parts of method.augmentation are not applied"
                    )
            world.wait()
            limits = Limits(max_hours, stop_after)
            metrics = train(recipe, shards, out, world, reporter, limits, track)
        if not world.is_main:
            return None
        checkpoint = newest_checkpoint(out)
    first = next(iter(MetricsLog(out).retrieval()), {})
    return PretrainResult(
        str(out), str(checkpoint.path), checkpoint.state.step, metrics,
        {f"retrieval/{level}": share / 100 for level, share in first.items()},
    )  # fmt: skip


def _require_fit(recipe: PretrainRecipe, processes: int) -> None:
    """Raises UsageError when the batch or its groups cannot be divided equally."""
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    shares, norm = processes * accumulate, recipe.method.batch_norm
    what = f"{processes} processes" + (
        f" x train.accumulate = {accumulate}" if accumulate > 1 else ""
    )
    if batch % shares:
        groups = norm.groups if norm.sync or norm.groups % shares == 0 else shares
        unit = math.lcm(shares, 1 if norm.sync else groups)
        also = f" and method.batch_norm.groups={groups}" if groups != norm.groups else ""
        raise UsageError(
            f"data.batch_size is {batch}, which does not divide equally among {what}. "
            f"Use {max(batch // unit * unit, 2 * unit)}{also}, for example."
        )
    if not norm.sync and norm.groups % shares:
        raise UsageError(
            f"method.batch_norm.groups is {norm.groups}: the groups of the global batch do not "
            f"divide equally among {what}. Use a multiple of {shares}, or method.batch_norm.sync."
        )


def _require_parts(recipe: PretrainRecipe) -> None:
    """Raises UsageError when the method or the backbone does not exist."""

    method_class(recipe)
    if layout_of(recipe.model.backbone) != "torchvision":
        backbone = make_backbone(recipe.model.backbone, recipe.method.augmentation.channels)
        used = recipe.method.levels
        require_levels(backbone, used, f"the losses are at {', '.join(used)} (method.*.weights)")


def _require_init(recipe: PretrainRecipe) -> None:
    """Raises UsageError when the initial weights are missing or do not fit."""

    if recipe.model.init is not None:
        architecture, channels = recipe.model.backbone, recipe.method.augmentation.channels
        weights = open_weights(recipe.model.init, architecture)
        theirs = weights.metadata.input.channels
        if theirs != channels:
            raise UsageError(
                f"model.init: {recipe.model.init}: the weights take images of {counted(theirs)}, "
                f"but method.augmentation.mean is for {channels}, and a first convolution cannot "
                f"be converted. Start from random weights (model.init: null), or from weights for "
                f"{counted(channels)}. (recipe key: model.init)"
            )
        require_fit(weights, architecture, channels)


def _require_channels(recipe: PretrainRecipe, shards: ShardSet) -> None:
    """Raises UsageError when the recipe's statistics are for another number of channels."""
    wanted = recipe.method.augmentation.channels
    found = 3 if shards.pixels is None else shards.pixels.channels
    if wanted != found:
        raise UsageError(
            f"{shards.name}: the shards hold {described(shards.pixels)}, but "
            f"method.augmentation.mean and std have {wanted} values. Set both as "
            f"`dupr prepare stats` measures them. (recipe key: method.augmentation.mean)"
        )


def _check_claim(
    recipe: PretrainRecipe,
    shards: ShardSet,
    out: Path,
    allow_changed: Collection[str],
    reporter: Reporter,
) -> list[dict[str, object]]:
    """All recipe changes in the history of the run in `out`, including those of this call.

    Raises UsageError when `out` holds anything but a run of this recipe and data, or when a
    difference changes the result and is not allowed. Changes nothing.
    """

    if not holds(out, [RECIPE_FILE], "run"):
        return []
    environment = read_environment(out)
    changes: list[dict[str, object]] = environment.get("changes", [])
    before, now = _recorded_keys(out), recipe_keys(recipe.model_dump(mode="json"))
    unknown = sorted(set(allow_changed) - now.keys() - before.keys() - {"data"})
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(now), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"--allow-changed {unknown[0]}: no recipe key has this name.{hint}")
    refused = []
    for key, difference in differences(before, now).items():
        if key in OPERATIONAL_KEYS:
            continue
        if key in ROUNDING_KEYS:
            reporter.info(f"{difference}: the run continues equal to rounding, not bit for bit")
        elif key in allow_changed:
            reporter.warning(f"{difference} (allowed): the run now mixes two recipes")
            changes.append({"key": key, "before": before.get(key), "after": now.get(key)})
        else:
            refused.append((key, difference))
    there = environment.get("data", {})
    if there and there["sha256"] != shards.identity() and "data" not in allow_changed:
        difference = (
            f"data: {there['images']} images of {there['name']} there, "
            f"{len(shards)} images of {shards.name} now"
        )
        refused.append(("data", difference))
    if refused:
        allow = " ".join(f"--allow-changed {key}" for key, _ in refused)
        raise UsageError(
            f"{out}: it already holds a run with another recipe or other data:\n"
            + "\n".join(f"  {difference}" for _, difference in refused)
            + "\nGive the same recipe to continue that run, another --out for a new run, "
            f"--overwrite to replace it, or continue with the change: {allow}"
        )
    return changes


def _recorded_keys(out: Path) -> dict[str, object]:
    """Recipe keys of the run in `out`; keys that its dupr did not have yet get the value of what it
    did."""
    try:
        values = cast(Any, read_yaml(out / RECIPE_FILE))
    except ParseError as error:
        raise UsageError(
            f"{out / RECIPE_FILE}: the run's recipe cannot be read ({error}). Restore it, or "
            f"replace the run with --overwrite."
        ) from error
    with suppress(AttributeError, TypeError):  # not the form of any recipe: the differences say so
        values["method"]["patch"].setdefault("cell_centres", "convention")
    with suppress(ValueError):  # written by a dupr with other keys: the differences name them
        values = PretrainRecipe.model_validate(values).model_dump(mode="json")
    return recipe_keys(values)


def output_files(out: Path) -> list[Path]:
    """The files of the run in `out`; empty if it holds no run."""

    if not (out / RECIPE_FILE).is_file():
        return []
    return [*training_files(out), out / ENVIRONMENT_FILE, out / RECIPE_FILE]


def _claim(
    recipe: PretrainRecipe,
    shards: ShardSet,
    out: Path,
    overwrite: bool,
    allow_changed: Collection[str],
    reporter: Reporter,
) -> None:
    """Make `out` the directory of this run, or check that it already is."""

    changes: list[dict[str, object]] = []
    if overwrite and holds(out, [RECIPE_FILE], "run"):
        remove(out, output_files(out))
    else:
        changes = _check_claim(recipe, shards, out, allow_changed, reporter)
    data = {"name": shards.name, "images": len(shards), "sha256": shards.identity()}
    write_environment(out, {**environment(), "data": data, "changes": changes})
    # This comes last: from now on the directory holds a run that can be continued.
    write_text(out / RECIPE_FILE, recipe_yaml(recipe))
