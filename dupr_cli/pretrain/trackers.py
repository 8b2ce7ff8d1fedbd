"""Experiment trackers: the metrics of a run, sent to trackio, Weights & Biases or MLflow as well.

A tracker sees what metrics.jsonl holds, and the recipe. It never stops a run: one that fails is
left out from then on, with a warning. A continued run goes on in the same place, because the
tracker knows a run by its directory. Trackers of other packages are entry points of the group
dupr.trackers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, cast

from dupr_cli.addresses import without_secrets
from dupr_cli.errors import UsageError
from dupr_cli.outside_text import one_line
from dupr_cli.plugins import TRACKERS, load_plugin, plugin_names
from dupr_cli.progress import Reporter

_PROJECT = "dupr"


class Tracker(Protocol):
    """Takes the metrics of one run. The class attribute `package` is what pip installs."""

    package: str

    def __init__(self, project: str, run: Path, recipe: Mapping[str, Any]) -> None:
        """run: the run directory, new or continued. recipe: resolved, as plain values."""
        ...

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by the names of metrics.jsonl, after `step`; 0 is before the first."""
        ...

    def close(self) -> None: ...


class Trackio:
    package = "trackio"

    def __init__(self, project: str, run: Path, recipe: Mapping[str, Any]) -> None:
        self._library: Any = import_module("trackio")
        self._library.init(
            project=project, name=f"{run.name}-{_id(run)[:6]}", config=dict(recipe), resume="allow"
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        self._library.finish()


class WeightsAndBiases:
    package = "wandb"

    def __init__(self, project: str, run: Path, recipe: Mapping[str, Any]) -> None:
        library: Any = import_module("wandb")
        self._run = library.init(
            project=project, name=run.name, id=_id(run), config=dict(recipe), resume="allow"
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    package = "mlflow-skinny"

    def __init__(self, project: str, run: Path, recipe: Mapping[str, Any]) -> None:
        library: Any = import_module("mlflow")
        self._metric: Callable[..., Any] = library.entities.Metric
        self._client = library.MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        number = (
            self._client.create_experiment(project)
            if experiment is None
            else experiment.experiment_id
        )
        found = self._client.search_runs([number], f"tags.dupr_run = '{_id(run)}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        made = self._client.create_run(number, tags={"dupr_run": _id(run)}, run_name=run.name)
        self._run = made.info.run_id
        for key, value in _flat(recipe).items():
            self._client.log_param(self._run, key, value)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackers:
    """The trackers that a run was given. Any of them may fail without consequence."""

    def __init__(
        self, wanted: Sequence[str], run: Path, recipe: Mapping[str, Any], reporter: Reporter
    ) -> None:
        """wanted: NAME or NAME:PROJECT each. Raises UsageError as `tracker_class` does."""
        self._reporter = reporter
        self._open: dict[str, Tracker] = {}
        for given in wanted:
            made, project = tracker_class(given), given.partition(":")[2] or _PROJECT
            with self._guarded(given):
                self._open[given] = made(project, run, recipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for given, tracker in list(self._open.items()):
            with self._guarded(given):
                tracker.close()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """values: finite numbers by name."""
        for given, tracker in list(self._open.items()):
            with self._guarded(given):
                tracker.record(step, values)

    @contextmanager
    def _guarded(self, given: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service or its library raises
            self._open.pop(given, None)
            said = one_line(without_secrets(f"{type(error).__name__}: {error}"))
            self._reporter.warning(f"--track {given}: left out from now on ({said})")


def tracker_class(given: str) -> type[Tracker]:
    """The tracker of NAME or NAME:PROJECT. Raises UsageError if it is unknown or not installed."""
    name = given.partition(":")[0]
    if name not in plugin_names(TRACKERS):
        raise UsageError(
            f"--track {given}: the trackers are {', '.join(plugin_names(TRACKERS))}; a project "
            f"may follow, as in {plugin_names(TRACKERS)[0]}:mine."
        )
    found = cast("type[Tracker]", load_plugin(TRACKERS, name))
    module = found.package.partition("-")[0]
    if find_spec(module) is None:
        raise UsageError(
            f"--track {given}: {module} is not installed; `pip install 'dupr-cli[{name}]'`."
        )
    return found


def require_trackers(wanted: Sequence[str]) -> None:
    """Raises UsageError for one that is unknown or not installed."""
    for given in wanted:
        tracker_class(given)


def _id(run: Path) -> str:
    """The same for every call that continues a run, wherever it is called from."""
    return hashlib.sha256(str(run.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
