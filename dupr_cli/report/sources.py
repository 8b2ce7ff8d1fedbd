"""What a report is about: runs, evaluations, comparisons over labels and studies, by their files.

An argument is recognised by what it holds, so that the order and the mixture do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from dupr_cli.artifacts.files import leads_outside
from dupr_cli.artifacts.label_curves import LABELS_SAVED, LabelCurves
from dupr_cli.artifacts.results import RESULTS, Results
from dupr_cli.artifacts.run import (
    CHECKPOINTS,
    METRICS_FILE,
    RECIPE_FILE,
    MetricsLog,
    is_checkpoint,
    list_checkpoints,
    read_environment,
)
from dupr_cli.errors import UsageError
from dupr_cli.inspect.curves import run_names
from dupr_cli.parsing import ParseError, read_yaml
from dupr_cli.recipe import PretrainRecipe, load_recipe, recipe_keys
from dupr_cli.study import RECIPE_FILE as STUDY_FILE
from dupr_cli.study.report import StudyReport

T = TypeVar("T")

_LARGEST = 1e15  # no run logs more; NaN compares as neither

_KINDS = (
    f"a run directory ({RECIPE_FILE} and {METRICS_FILE}), an evaluation ({RESULTS}), a comparison "
    f"over numbers of labels ({LABELS_SAVED}) or a study ({STUDY_FILE})"
)


@dataclass(frozen=True)
class Run:
    """A run of pre-training. letter: its mark in figures. method: its name in the literature.

    recipe: dotted keys. lines: its log.
    """

    letter: str
    name: str
    method: str
    path: Path
    recipe: dict[str, object]
    environment: dict[str, Any]
    lines: list[dict[str, float]]
    checkpoints: list[Path]

    def points(self, name: str) -> list[tuple[float, float]]:
        """Step and value of everything logged under a name."""
        return [(line["step"], line[name]) for line in self.lines if name in line]

    @property
    def title(self) -> str:
        """Letter and name."""
        return f"{self.letter} ({self.name})"

    def last_of(self, prefix: str) -> dict[str, float]:
        """The last value of everything logged under names that begin so."""
        found: dict[str, float] = {}
        for line in self.lines:
            found |= {name: value for name, value in line.items() if name.startswith(prefix)}
        return found

    def last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.lines) if name in line), None)


@dataclass(frozen=True)
class Named(Generic[T]):
    """An artifact with the name that the report gives it."""

    name: str
    path: Path
    content: T


@dataclass(frozen=True)
class Sources:
    """Everything that a report is about, in the order given."""

    runs: list[Run] = field(default_factory=list)
    results: list[Named[Results]] = field(default_factory=list)
    labels: list[Named[LabelCurves]] = field(default_factory=list)
    studies: list[Named[StudyReport]] = field(default_factory=list)


def open_sources(paths: Sequence[Path]) -> Sources:
    """Read all artifacts. Raises UsageError for a path that is none of them, or is damaged."""
    found = Sources()
    for path, name in zip(paths, run_names(paths), strict=True):
        _add(found, path, name)
    return found


def _add(found: Sources, path: Path, name: str) -> None:
    if not path.exists():
        raise UsageError(f"{path}: does not exist. Give {_KINDS}.")
    folder = path if path.is_dir() else path.parent
    file = path.name if path.is_file() else ""
    if is_checkpoint(folder):
        raise UsageError(f"{path} is a checkpoint; give its run directory instead.")
    if file == STUDY_FILE or (not file and (folder / STUDY_FILE).is_file()):
        found.studies.append(Named(name, folder, StudyReport.read(folder)))
    elif file == LABELS_SAVED or (not file and (folder / LABELS_SAVED).is_file()):
        curves = LabelCurves.read(folder)
        if not curves.curves or not all(of and all(of.values()) for of in curves.curves.values()):
            raise UsageError(f"{folder / LABELS_SAVED}: it holds no figures.")
        found.labels.append(Named(name, folder, curves))
        for count, within in sorted(curves.folders.items()):
            if leads_outside(within):
                raise UsageError(f"{folder / LABELS_SAVED}: {within} is not in its folder.")
            results = _results(folder / within)
            found.results.append(Named(f"{name}, {count} labels", folder / within, results))
    elif file == RESULTS or (not file and (folder / RESULTS).is_file()):
        found.results.append(Named(name, folder, _results(folder)))
    elif not file and (folder / RECIPE_FILE).is_file() and _was_started(folder):
        found.runs.append(_run(folder, name, _letter(len(found.runs))))
    else:
        raise UsageError(
            f"{path} is none of the things that a report is about. Give {_KINDS}. An evaluation "
            f"has its file when it is finished; the same command continues it."
        )


def _results(folder: Path) -> Results:
    results = Results.read(folder)
    if not results.results:
        raise UsageError(f"{folder / RESULTS}: it holds no figures of any weights.")
    return results


def _was_started(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / CHECKPOINTS).is_dir()


def _letter(number: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    rounds, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(rounds) if rounds else "")


def _run(folder: Path, name: str, letter: str) -> Run:
    try:
        recipe = recipe_keys(read_yaml(folder / RECIPE_FILE))
    except (OSError, ParseError) as error:
        raise UsageError(f"{folder / RECIPE_FILE}: cannot be read ({error}).") from error
    return Run(
        letter,
        name,
        _method(folder, recipe),
        folder,
        recipe,
        read_environment(folder),
        [line for line in map(_plausible, MetricsLog(folder).read()) if "step" in line],
        list_checkpoints(folder),
    )


def _plausible(line: dict[str, float]) -> dict[str, float]:
    """The values that a figure can show, which those of a damaged log may not be."""
    return {name: value for name, value in line.items() if abs(value) < _LARGEST}


def _method(folder: Path, keys: dict[str, object]) -> str:
    try:
        return load_recipe(PretrainRecipe, str(folder / RECIPE_FILE)).method.title
    except UsageError:  # from another version, or with a method that is not installed
        return str(keys.get("method.name", "unknown method"))
