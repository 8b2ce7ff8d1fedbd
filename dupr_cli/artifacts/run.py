"""The run directory of a pre-training run, and its checkpoints.

    recipe.yaml  environment.json  metrics.jsonl  events.out.tfevents.*
    checkpoints/step-00000100/   model.safetensors  optimizer.safetensors  state.json
    latest -> checkpoints/step-00000100

A checkpoint is written under a temporary name, flushed and renamed, so a folder with the final name
is whole. state.json lists size and sha256 of the other files, so that later damage is detected.
docs/formats.md describes every field.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dupr_cli import __version__
from dupr_cli.artifacts.files import (
    atomic_directory,
    fsync_directory,
    sha256_file,
    shared_mode,
    write_json,
    write_text,
)
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import RunError, UsageError
from dupr_cli.parsing import ParseError, parse_json, read_limited, validated

# Of state.json. 2: `input_range`. Runs on RGB of 8 bits are still written as 1, without it.
FORMAT_VERSION = 2
ENVIRONMENT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
LATEST = "latest"
# Retrieval, relative to an untrained network's, that counts as learning.
LEARNING = 1.2
_ERRORS = 2.0  # standard errors beyond which a difference of shares is more than chance


# Mean or standard deviation of each channel.
Statistics = list[Annotated[float, Field(allow_inf_nan=False)]]
ImageSide = Annotated[int, Field(ge=1, le=65535)]
# A file in the folder of its record, and nowhere else.
FileName = Annotated[str, Field(pattern=r"^[^/\x00.][^/\x00]*$")]


def require_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ParseError, naming the key, unless they can normalise an image.

    Pixels have the mean subtracted and are divided by the standard deviation, channel by channel.
    """
    for key, values in (("input_mean", mean), ("input_std", std)):
        if not values or not all(map(math.isfinite, values)):
            raise ParseError(f"{key} is {list(values)}, but one finite number a channel is needed")
    if min(std) <= 0:
        raise ParseError(f"input_std is {list(std)}, but pixels are divided by these numbers")
    if len(mean) != len(std):
        raise ParseError(f"input_mean has {len(mean)} values, but input_std has {len(std)}")


@dataclass(frozen=True)
class FileFacts:
    """What state.json says of another file of its checkpoint."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass
class CheckpointState:
    """state.json: everything about a checkpoint that is not a tensor.

    step: number of optimiser steps; with the seed it determines the position in the data, the
    learning rate and all random streams. processes: number of processes of the run at that time.
    loss_scaler: state of the float16 scaler, empty for other precisions. method: the pre-training
    method, by its name in the literature. input_range: see `WeightsMetadata`.
    """

    step: Annotated[int, Field(ge=0)]
    architecture: str
    input_mean: Statistics
    input_std: Statistics
    input_size: ImageSide
    recipe_sha256: str
    files: dict[FileName, FileFacts] = field(default_factory=dict)
    processes: Annotated[int, Field(ge=1)] = 1
    loss_scaler: dict[str, int | float] = field(default_factory=dict)
    method: str = ""
    input_range: Annotated[Statistics, Field(min_length=2, max_length=2)] | None = None
    extra: dict[str, int | float] = field(default_factory=dict)
    dupr_version: str = __version__
    format_version: int = 1

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        if self.input_range is None:
            del values["input_range"]
            return values
        return {**values, "format_version": FORMAT_VERSION}


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: CheckpointState

    @classmethod
    def read(cls, path: Path, verify: bool = False) -> Checkpoint:
        """Raises UsageError when the checkpoint is not whole, VersionError for a later format.

        verify: also compare the sha256 sums, which reads every file.
        """
        try:
            data = read_limited(path / STATE_FILE)
            values = parse_record(data, FORMAT_VERSION, path / STATE_FILE)
            state = validated(CheckpointState, values)
            require_statistics(state.input_mean, state.input_std)
        except (OSError, ParseError) as error:
            raise UsageError(f"{path}: {STATE_FILE} cannot be read ({error}).") from error
        for name, facts in state.files.items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts.bytes:
                found = "missing" if size is None else f"{size} bytes"
                raise UsageError(
                    f"{file}: the checkpoint is damaged: {found} instead of {facts.bytes} bytes."
                )
            if verify and sha256_file(file) != facts.sha256:
                raise UsageError(f"{file}: the checkpoint is damaged: its sha256 has changed.")
        return cls(path, state)


def training_files(folder: Path) -> list[Path]:
    """Files that training writes into a run or trial: log, events, checkpoints, `latest`."""
    checkpoints = [
        path / name
        for path in (folder / CHECKPOINTS).glob("*step-*")
        for name in (STATE_FILE, MODEL_FILE, OPTIMIZER_FILE)
    ]
    events = folder.glob("events.out.tfevents.*")
    return [folder / METRICS_FILE, folder / LATEST, *events, *checkpoints]


def is_checkpoint(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whether whole or not."""
    return sorted((run / CHECKPOINTS).glob("step-*"))


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run directory.

    Raises UsageError when the folder is not a run directory, or none of its checkpoints is whole.
    """
    paths = list_checkpoints(run)
    problems = []
    for path in reversed(paths):
        try:
            return Checkpoint.read(path)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(f"{run}: no checkpoint is whole. " + " ".join(problems))
    raise UsageError(
        f"{run}: not a run directory with checkpoints (no {CHECKPOINTS}/step-*/). "
        f"A run writes its first one after train.checkpoint_every steps."
    )


def write_checkpoint(
    run: Path,
    state: CheckpointState,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write checkpoints/step-N, point `latest` at it, and delete old checkpoints.

    The newest `keep` checkpoints stay, and those of steps that are a multiple of `keep_every`. This
    function fills in state.files and moves tensors to the CPU. Raises RunError when the file system
    refuses; existing checkpoints are then unchanged.
    """
    path = run / CHECKPOINTS / f"step-{state.step:08d}"
    if path.exists():  # it is damaged, otherwise the run would have resumed after it
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(path) as folder:
        files: dict[str, FileFacts] = {}
        for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            try:
                with shared_mode(folder / name):
                    save_file(plain, folder / name)
            except SafetensorError as error:
                raise RunError(
                    f"{path}: the checkpoint cannot be written: {error}. Free some space and give "
                    f"the same command again to continue from the previous checkpoint."
                ) from error
            size = (folder / name).stat().st_size
            files[name] = FileFacts(size, sha256_file(folder / name))
        write_json(folder / STATE_FILE, replace(state, files=files).to_json())
    link = run / f".{LATEST}.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(CHECKPOINTS) / path.name)
    link.replace(run / LATEST)
    fsync_directory(run)
    for old in list_checkpoints(run)[:-keep]:
        step = int(old.name.removeprefix("step-"))
        if keep_every is None or step % keep_every:
            shutil.rmtree(old)
    return path


def write_environment(run: Path, facts: Mapping[str, object]) -> None:
    """Write environment.json: versions, hardware, data, and recipe changes during the run."""
    write_json(run / ENVIRONMENT_FILE, {"format_version": ENVIRONMENT_VERSION, **facts})


def read_environment(run: Path) -> dict[str, Any]:
    """Read environment.json; empty if the run has none.

    Raises UsageError when the file is damaged, VersionError for a later format.
    """
    path = run / ENVIRONMENT_FILE
    if not path.is_file():
        return {}
    try:
        facts = parse_record(read_limited(path), ENVIRONMENT_VERSION, path)
        validated(_CheckedFacts, {key: facts[key] for key in _CHECKED_FACTS if key in facts})
    except (OSError, ParseError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error
    return facts


@dataclass(frozen=True)
class _DataFacts:
    name: str
    images: int
    sha256: str


@dataclass(frozen=True)
class _CheckedFacts:
    """The part of environment.json that a continued run needs; the rest is for people."""

    data: _DataFacts | None = None
    changes: list[dict[str, object]] = field(default_factory=list)


_CHECKED_FACTS = tuple(fact.name for fact in fields(_CheckedFacts))


def retrieval_of(line: Mapping[str, float]) -> dict[str, float]:
    """Held-out patch retrieval of all pairs in a log line, percent by level; empty without it."""
    prefix = "retrieval/"
    return {k.removeprefix(prefix): 100 * v for k, v in line.items() if k.startswith(prefix)}


def retrieval_rose(first: float, last: float, patches: float | None) -> bool:
    """Whether a share of so many patches rose by a factor that counts, and by more than chance."""
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / max(1.0, patches or 1.0))
    return last > LEARNING * first and last - first > _ERRORS * error


class MetricsLog:
    """metrics.jsonl: one line of JSON per log step, appended and flushed."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_FILE

    def read(self) -> list[dict[str, float]]:
        """All complete lines; a last line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_bytes().splitlines():
            try:
                lines.append(validated(dict[str, float], parse_json(line)))
            except ParseError:
                break
        return lines

    def retrieval(self) -> list[dict[str, float]]:
        """Held-out patch retrieval of all pairs, percent by level, at the start and as measured."""
        return [shares for line in self.read() if (shares := retrieval_of(line))]

    def latest(self) -> dict[str, float]:
        """The newest value of every logged quantity."""
        values: dict[str, float] = {}
        for line in self.read():
            values |= line
        return values

    def rewind(self, step: int) -> None:
        """Drop lines after `step`: a continued run writes them again."""
        if self.path.exists():
            lines = [json.dumps(line) for line in self.read() if line["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))

    def append(self, values: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
