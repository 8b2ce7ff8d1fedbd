"""`dupr study`: many pre-training runs and evaluations as one table.

    OUT/study.yaml                         the resolved recipe
    OUT/pretrain/<method>-s<seed>/         a run of `dupr pretrain`
    OUT/evaluate/<protocol>/<start>/       an evaluation of `dupr evaluate`, of one start
    OUT/report.md  report.json  report.csv  report.tex  <protocol>.png
    OUT/cells/                             what is finished, and how long it took

A start is a run, or a control such as random weights. cells.py says which cells there are, and
report.py turns their results into the report. Every cell is an ordinary output of its stage, so
that what is finished is not run again, and an interrupted cell continues.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dupr_cli.artifacts.files import write_text
from dupr_cli.errors import RunError, UsageError
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import Overrides, as_path, recipe_yaml, resolve_recipe
from dupr_cli.recipe.study import StudyRecipe
from dupr_cli.runtime.output import holds, writing
from dupr_cli.runtime.ray_cluster import ray_cluster, require_ray
from dupr_cli.runtime.stopping import stoppable
from dupr_cli.study.cells import Chain, chains, check_inputs, check_recipes, run_chain
from dupr_cli.study.report import StudyReport, missing_cells, write_report
from dupr_cli.study.types import StudyPlan

RECIPE_FILE = "study.yaml"
ENGINES = ("here", "ray")
_POLL_SECONDS = 1.0


def plan(
    recipe: StudyRecipe | str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    task: tuple[int, int] | None = None,
) -> StudyPlan:
    """The cells of the study and those that are not finished. Nothing is changed.

    Raises UsageError as `run` does.
    """
    recipe, out = resolve_recipe(StudyRecipe, recipe, overrides), as_path(out, "out")
    _check(recipe, out)
    of_task = _of_task(chains(recipe, out), task)
    cells = [cell.name for chain in of_task for cell in chain.cells]
    return StudyPlan(
        name=recipe.name,
        cells=cells,
        missing=[name for name in missing_cells(recipe, out) if name in cells],
        out=str(out),
    )


def run(
    recipe: StudyRecipe | str | Path,
    out: str | Path,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    task: tuple[int, int] | None = None,
    engine: str = "here",
    max_hours: float | None = None,
    reporter: Reporter | None = None,
) -> StudyReport | None:
    """Run the cells that are not finished, then write the report; None if cells are still missing.

    task: (I, N), to run only part I of N, counted from 1, beside other processes on the same `out`;
    whichever ends last writes the report. engine: here, or ray for a running cluster whose machines
    see `out` and the data by the same paths. max_hours: the cell that is running then is saved, and
    the rest waits.
    Raises UsageError for a wrong recipe, unusable data or an `out` that holds something else,
    RunError at the end if cells failed, StoppedRunError when it is stopped.
    """
    recipe, out = resolve_recipe(StudyRecipe, recipe, overrides), as_path(out, "out")
    reporter = reporter or SilentReporter()
    _check(recipe, out)
    _check_engine(engine)
    with (
        stoppable("Finished cells are kept, and the same command continues."),
        writing(out, "dupr study", shared=True),
    ):
        if not _same_file(out, recipe):
            write_text(out / RECIPE_FILE, recipe_yaml(recipe))
        wanted = _of_task(chains(recipe, out), task)
        ends = None if max_hours is None else time.time() + 3600 * max_hours
        if engine == "ray":
            failed = _on_ray(recipe, wanted, device, reporter, ends)
        else:
            failed = [run_chain(recipe, chain, device, reporter, ends) for chain in wanted]
        failed = [words for words in failed if words]
        if failed:
            raise RunError(
                f"{len(failed)} cells failed; the others are kept:\n  "
                + "\n  ".join(failed)
                + "\nMend the cause and give the same command again."
            )
        missing = missing_cells(recipe, out)
        if missing:
            reporter.info(f"no report yet: {len(missing)} cells are missing, such as {missing[0]}")
            return None
        return write_report(recipe, out)


def _check(recipe: StudyRecipe, out: Path) -> None:
    """Raises UsageError, or RunError for damaged data, for what would fail only after hours."""
    for key in ("shards", "data"):
        if not getattr(recipe, key):
            raise UsageError(f"{key}: the study names no {key}. Give --{key}. (recipe key: {key})")
    check_recipes(recipe)
    if holds(out, [RECIPE_FILE], "study"):
        before = resolve_recipe(StudyRecipe, out / RECIPE_FILE)
        for key in ("shards", "data"):
            there, now = getattr(before, key), getattr(recipe, key)
            if there != now:
                raise UsageError(
                    f"{out} holds a study of other data:\n  {key}: {there} there, {now} now\n"
                    f"Give another --out for a new study."
                )
    check_inputs(recipe, out)


def _same_file(out: Path, recipe: StudyRecipe) -> bool:
    file = out / RECIPE_FILE
    return file.is_file() and file.read_text() == recipe_yaml(recipe)


def _of_task(every: Sequence[Chain], task: tuple[int, int] | None) -> list[Chain]:
    if task is None:
        return list(every)
    number, count = task
    return list(every[number - 1 :: count])


def _check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: use {' or '.join(ENGINES)}.")
    if engine == "ray":
        require_ray()


def _on_ray(
    recipe: StudyRecipe,
    wanted: Sequence[Chain],
    device: str,
    reporter: Reporter,
    ends: float | None,
) -> list[str]:
    """Run each chain as a task of a Ray cluster, whose machines must all see the data and OUT by
    the same paths; returns what `run_chain` does for each."""
    resources, failed = recipe.resources, []
    with ray_cluster() as ray, reporter.task("study", len(wanted), "chains") as progress:
        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=2)
        waiting = [
            remote(run_chain).remote(recipe, chain, device, SilentReporter(), ends)
            for chain in wanted
        ]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
            for words in ray.get(done):
                failed.append(words)
                progress.advance()
    return failed
