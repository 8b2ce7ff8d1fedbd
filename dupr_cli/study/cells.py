"""The cells of a study: which runs and evaluations there are, their names, and how they run.

Cells that need one another form a chain: a pre-training run, its evaluations, and those of its
permuted weights. Chains are independent, so tasks and machines share them out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dupr_cli.artifacts.files import write_json
from dupr_cli.errors import DuprError, StoppedRunError, UsageError
from dupr_cli.models.compared import RANDOM_WEIGHTS
from dupr_cli.parsing import read_json
from dupr_cli.progress import Reporter
from dupr_cli.recipe import EvaluateRecipe, PretrainRecipe, load_recipe, recipe_digest
from dupr_cli.recipe.base import PERMUTED
from dupr_cli.recipe.study import StudyRecipe

PRETRAIN, EVALUATE, CELLS = "pretrain", "evaluate", "cells"


@dataclass(frozen=True)
class Start:
    """Weights that are evaluated. kind: the method or control. seed: of pre-training, or None.

    weights: their address.
    """

    kind: str
    seed: int | None
    weights: str

    @property
    def name(self) -> str:
        plain = self.kind.replace(PERMUTED, "permuted-").replace("/", "-").replace(":", "-")
        return plain if self.seed is None else f"{plain}-s{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One run or evaluation. start: None for a pre-training run.

    name: also its place in OUT. record: written when it is finished, with the seconds of the call
    that finished it. needs: digest of the recipe of the run whose weights it evaluates.
    """

    name: str
    folder: Path
    recipe: PretrainRecipe | EvaluateRecipe
    record: Path
    start: Start | None = None
    needs: str = ""

    @property
    def identity(self) -> dict[str, str]:
        """What its record must hold for the cell to count as finished."""
        return {"recipe_sha256": recipe_digest(self.recipe), "needs": self.needs}

    @property
    def is_finished(self) -> bool:
        """Whether it was finished with its present recipe, on weights of their present recipe."""
        facts = self.facts()
        return all(facts.get(key) == value for key, value in self.identity.items())

    def facts(self) -> dict[str, Any]:
        """What its record holds; empty without one. Raises UsageError when it is damaged."""
        if not self.record.is_file():
            return {}
        try:
            return dict(read_json(self.record))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{self.record}: the record is damaged ({error}). Delete it; the same command then "
                f"checks the cell again."
            ) from error


@dataclass(frozen=True)
class Chain:
    """Cells to run in this order."""

    cells: list[Cell]


def check_recipes(recipe: StudyRecipe) -> None:
    """Raises RecipeError for a recipe of a cell that is wrong."""
    for name in recipe.methods:
        pretrain_recipe(recipe, name, recipe.pretrain_seeds[0])
    for name in recipe.protocols:
        evaluate_recipe(recipe, name)


def check_inputs(recipe: StudyRecipe, out: Path) -> None:
    """Open shards, data and controls. Raises the errors of the stages for what cannot be used."""
    from dupr_cli import evaluate, pretrain

    every = [cell for chain in chains(recipe, out) for cell in chain.cells if not cell.is_finished]
    for cell in every:
        if isinstance(cell.recipe, PretrainRecipe):
            pretrain.plan(cell.recipe, recipe.shards, cell.folder)
    # Evaluations of runs cannot be planned before the runs exist; random weights stand for them.
    for name in recipe.protocols:
        settings = evaluate_recipe(recipe, name)
        controls = [c for c in recipe.controls if not c.startswith(PERMUTED)] or [RANDOM_WEIGHTS]
        unused = out / EVALUATE / name / ".check"
        evaluate.plan(settings, controls, recipe.data, unused)


def pretrain_recipe(recipe: StudyRecipe, method: str, seed: int) -> PretrainRecipe:
    section = recipe.methods[method]
    given = [*recipe.pretrain_set, *section.set, f"seed={seed}"]
    return load_recipe(PretrainRecipe, section.recipe, given)


def evaluate_recipe(recipe: StudyRecipe, protocol: str) -> EvaluateRecipe:
    """The recipe of a protocol, for the methods' backbone: each start is evaluated by itself, so
    that `auto` would give random weights another one.

    Raises UsageError when the methods have several backbones.
    """
    section = recipe.protocols[protocol]
    given = [*recipe.evaluate_set, *section.set, f"trials={section.seeds}"]
    if section.labels is not None:
        given.append(f"data.labels={section.labels}")
    loaded = load_recipe(EvaluateRecipe, section.recipe, given)
    if loaded.is_semantic != (section.metric == "mIoU"):
        raise UsageError(
            f"protocols.{protocol}.metric is {section.metric}, but {section.recipe} measures "
            f"{loaded.primary_metric}; give metric: {loaded.primary_metric}. "
            f"(recipe key: protocols.{protocol}.metric)"
        )
    if loaded.detector.backbone != "auto":
        return loaded
    seed = recipe.pretrain_seeds[0]
    backbones = {pretrain_recipe(recipe, name, seed).model.backbone for name in recipe.methods}
    if len(backbones) > 1:
        raise UsageError(
            f"methods: they have the backbones {' and '.join(sorted(backbones))}, whose detectors "
            f"cannot be compared. Make a study of each. (recipe key: methods)"
        )
    return load_recipe(
        EvaluateRecipe, section.recipe, [*given, f"detector.backbone={backbones.pop()}"]
    )


def starts(recipe: StudyRecipe, out: Path) -> list[Start]:
    """All starts, methods first."""
    found = [
        Start(method, seed, str(out / PRETRAIN / f"{method}-s{seed}"))
        for method in recipe.methods
        for seed in recipe.pretrain_seeds
    ]
    for control in recipe.controls:
        method = control.removeprefix(PERMUTED)
        if control == method:
            found.append(Start(control, None, control))
        else:
            found += [
                Start(control, start.seed, f"{PERMUTED}{start.weights}")
                for start in found
                if start.kind == method
            ]
    return found


def chains(recipe: StudyRecipe, out: Path) -> list[Chain]:
    """All cells of the study, in chains."""

    def cell(
        name: str,
        settings: PretrainRecipe | EvaluateRecipe,
        start: Start | None = None,
        needs: str = "",
    ) -> Cell:
        return Cell(name, out / name, settings, out / CELLS / f"{name}.json", start, needs)

    found: dict[str, list[Cell]] = {}
    runs: dict[str, str] = {}
    protocols = {name: evaluate_recipe(recipe, name) for name in recipe.protocols}
    for start in starts(recipe, out):
        source = start.weights.removeprefix(PERMUTED)
        of_source = found.setdefault(source, [])
        if start.kind in recipe.methods:
            assert start.seed is not None
            settings = pretrain_recipe(recipe, start.kind, start.seed)
            runs[source] = recipe_digest(settings)
            of_source.append(cell(f"{PRETRAIN}/{start.name}", settings))
        for protocol, evaluation in protocols.items():
            name = f"{EVALUATE}/{protocol}/{start.name}"
            of_source.append(cell(name, evaluation, start, runs.get(source, "")))
    return [Chain(cells) for cells in found.values()]


def all_cells(recipe: StudyRecipe, out: Path) -> Iterator[Cell]:
    for chain in chains(recipe, out):
        yield from chain.cells


def run_chain(
    recipe: StudyRecipe, chain: Chain, device: str, reporter: Reporter, ends: float | None
) -> str:
    """Run the cells of a chain that are not finished.

    ends: when the time is up, by time.time; a cell that is running then is saved, with
    StoppedRunError. Returns the failed cell with its error, in words, after which the rest of the
    chain cannot run; empty if none failed.
    """
    for cell in chain.cells:
        if cell.is_finished:
            reporter.info(f"{cell.name}: finished before")
            continue
        reporter.info(f"{cell.name}:")
        started = time.perf_counter()
        hours = None if ends is None else max(0.0, ends - time.time()) / 3600
        try:
            facts = _run_cell(recipe, cell, device, reporter, hours)
        except StoppedRunError:
            raise
        except DuprError as error:
            return f"{cell.name}: {error}"
        seconds = round(time.perf_counter() - started, 1)
        cell.record.parent.mkdir(parents=True, exist_ok=True)
        write_json(cell.record, {**cell.identity, "seconds": seconds, **facts})
    return ""


def _run_cell(
    recipe: StudyRecipe, cell: Cell, device: str, reporter: Reporter, hours: float | None
) -> dict[str, float]:
    """Run one cell; returns what its record adds."""
    from dupr_cli import evaluate, pretrain

    if isinstance(cell.recipe, PretrainRecipe):
        result = pretrain.run(
            cell.recipe, recipe.shards, cell.folder, device=device, max_hours=hours,
            reporter=reporter,
        )  # fmt: skip
        assert result is not None  # a study runs in a single process
        return {"images_per_second": round(result.metrics.get("images_per_second", 0.0), 1)}
    assert cell.start is not None
    run = evaluate.run_labels if isinstance(cell.recipe.data.labels, list) else evaluate.run
    run(
        cell.recipe, [cell.start.weights], recipe.data, cell.folder, device=device,
        max_hours=hours, reporter=reporter,
    )  # fmt: skip
    return {}
