"""Stage 4, `dupr evaluate`: weights and a labelled set to AP, and a test of each difference.

A detector is trained on each of the compared weights once per seed, with the same images, budget
and random numbers, and tested with the protocol's metric: fine-tuned, or with a frozen backbone
(features.py). comparison.py runs the evaluation, label_curves.py the same with several numbers of
labels; data, detectors, their training, metrics and statistics are modules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import Results
from dupr_cli.errors import UsageError
from dupr_cli.evaluate import label_curves
from dupr_cli.evaluate.comparison import Comparison, compare, prepare_comparison
from dupr_cli.evaluate.types import EvaluatePlan
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    EvaluateRecipe,
    Overrides,
    as_address,
    as_addresses,
    as_path,
    resolve_recipe,
)
from dupr_cli.runtime.devices import choose_device
from dupr_cli.runtime.output import writing
from dupr_cli.runtime.parallel import World, join
from dupr_cli.runtime.stopping import Limits, stoppable


def plan(
    recipe: EvaluateRecipe | str | Path,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    processes: int = 1,
    overwrite: bool = False,
    notes: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> EvaluatePlan:
    """Check everything that `run` needs and return its plan. Nothing is changed.

    Raises UsageError, or RunError for damaged data, as `run` does before it starts.
    """

    recipe = resolve_recipe(EvaluateRecipe, recipe, overrides)
    weights, data = as_addresses(weights, "weights"), as_address(data, "data")
    out = as_path(out, "out")
    chosen = choose_device(device)
    comparison = prepare_comparison(recipe, weights, data, out, chosen, processes, notes, reporter)
    if isinstance(recipe.data.labels, list):
        parts = label_curves.comparisons(comparison)
        if not overwrite:
            label_curves.claim(comparison).check(out)
            for part in parts.values():
                part.claim().check(part.out)
        return replace(comparison.plan(), label_counts=list(parts))
    if not overwrite:
        comparison.claim().check(out)
    return comparison.plan()


def run(
    recipe: EvaluateRecipe | str | Path,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    leaks_in: Sequence[str] = (),
    notes: Sequence[str] = (),
    max_hours: float | None = None,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
) -> Results:
    """Train and test a detector on each of the weights, and write the results into `out`.

    recipe, overrides: see `dupr_cli.recipe.given`.
    weights: run directories, checkpoints, weights files or torchvision:NAME; `none` is a random
    backbone. data: a VOC tree, COCO's or Cityscapes' layout, or labelled shards. device: auto, cpu,
    cuda or cuda:N; under torchrun each process takes its own GPU and its part of every batch.
    leaks_in: pre-training shards in which test images are looked for. notes: reported with the
    results.
    `out` gets results.json, table.txt, pictures, and a folder per weights with its trials. Trials
    that finished there before, under the same recipe, data and device, are not run again, and an
    interrupted one continues.
    Raises UsageError for inputs that cannot be used or an `out` that holds another evaluation
    (`overwrite` replaces it), RunError for damaged images and for training that diverges,
    StoppedRunError when a signal or a limit stops it.
    """
    recipe = resolve_recipe(EvaluateRecipe, recipe, overrides)
    if isinstance(recipe.data.labels, list):
        raise UsageError(
            f"data.labels: {recipe.data.labels} is a list, which `evaluate.run_labels` takes; give "
            f"one number. (recipe key: data.labels)"
        )
    limits = Limits(max_hours, stop_after)
    with _prepared(recipe, weights, data, out, device, notes, reporter) as (c, world, reporter):
        return compare(c, world, overwrite, reporter, limits, leaks_in)


def run_labels(
    recipe: EvaluateRecipe | str | Path,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    overwrite: bool = False,
    leaks_in: Sequence[str] = (),
    notes: Sequence[str] = (),
    max_hours: float | None = None,
    stop_after: int | None = None,
    baseline: str | None = None,
    reporter: Reporter | None = None,
) -> LabelCurves:
    """`run` with each number of labels of the list `data.labels`, and the labels that are saved.

    baseline: which of the weights the labels saved refer to; random weights by default, or the
    first if there are none. `out` gets a folder for each number of labels, as `run` writes it, and
    labels-saved.json with its tables and picture.
    Raises as `run` does, and UsageError when `data.labels` is no list.
    """
    recipe = resolve_recipe(EvaluateRecipe, recipe, overrides)
    if not isinstance(recipe.data.labels, list):
        raise UsageError(
            f"data.labels: {recipe.data.labels} is no list of numbers, such as [50, 100, all]. "
            f"(recipe key: data.labels)"
        )
    limits = Limits(max_hours, stop_after)
    with _prepared(recipe, weights, data, out, device, notes, reporter) as (c, world, reporter):
        return label_curves.compare_labels(
            c, world, overwrite, reporter, limits, leaks_in, baseline
        )


@contextmanager
def _prepared(
    recipe: EvaluateRecipe,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    device: str,
    notes: Sequence[str],
    reporter: Reporter | None,
) -> Iterator[tuple[Comparison, World, Reporter]]:
    """The checked comparison, with its processes joined and its output locked."""
    weights, data = as_addresses(weights, "weights"), as_address(data, "data")
    out = as_path(out, "out")
    with (
        stoppable("Finished trials are kept, and the same command continues."),
        join(device) as world,
    ):
        reporter = (reporter or SilentReporter()) if world.is_main else SilentReporter()
        comparison = prepare_comparison(
            recipe, weights, data, out, world.device, world.size, notes, reporter
        )
        with writing(out, "dupr evaluate") if world.is_main else nullcontext():
            yield comparison, world, reporter
