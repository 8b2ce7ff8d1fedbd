"""Frozen-feature probes: measure a backbone's features without training any of its weights.

The probes are nearest neighbours, linear classifiers, VOC07 image classification, and retrieval of
patches and objects. comparison.py runs a probe; protocols.py defines what each probe measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dupr_cli.artifacts.results import Results
from dupr_cli.probe.comparison import measure_all, prepare_comparison
from dupr_cli.probe.types import ProbeData, ProbePlan
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import (
    Overrides,
    ProbeRecipe,
    as_address,
    as_addresses,
    as_path,
    resolve_recipe,
)
from dupr_cli.runtime.output import writing
from dupr_cli.runtime.stopping import stoppable


def plan(
    recipe: ProbeRecipe | str | Path,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    train_split: str = "train",
    test_split: str | None = "val",
    test_data: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> ProbePlan:
    """Check everything that `run` needs and return its plan. Nothing is changed.

    Raises as `run` does.
    """

    recipe = resolve_recipe(ProbeRecipe, recipe, overrides)
    weights, data = as_addresses(weights, "weights"), as_address(data, "data")
    out = as_path(out, "out")
    where = ProbeData(data, train_split, test_split, test_data)
    comparison = prepare_comparison(recipe, weights, where, out, device, SilentReporter())
    if not overwrite:
        comparison.claim().check(out)
    return comparison.plan()


def run(
    recipe: ProbeRecipe | str | Path,
    weights: Sequence[str | Path] | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    train_split: str = "train",
    test_split: str | None = "val",
    test_data: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Measure each of the weights by the recipe's protocol, and write the results into `out`.

    recipe, overrides: see `dupr_cli.recipe.given`.
    weights: what `dupr_cli.models.compared` opens; `none` is a random backbone. data: labelled
    shards, class folders, a VOC tree; for patch-retrieval any images. test_data: another set to
    test on. device: auto, cpu, cuda or cuda:N.
    `out` gets results.json, table.txt and a folder per weights with its result. Weights that
    finished there before, under the same recipe, data and device, are not measured again.
    Raises UsageError for inputs that cannot be used or an `out` that holds another probe
    (`overwrite` replaces it), RunError for damaged images.
    """

    recipe = resolve_recipe(ProbeRecipe, recipe, overrides)
    weights, data = as_addresses(weights, "weights"), as_address(data, "data")
    out = as_path(out, "out")
    reporter = reporter or SilentReporter()
    where = ProbeData(data, train_split, test_split, test_data)
    with stoppable("Finished weights are kept, and the same command continues."):
        comparison = prepare_comparison(recipe, weights, where, out, device, reporter)
        with writing(out, f"dupr evaluate {recipe.protocol}"):
            return measure_all(comparison, overwrite, reporter)
