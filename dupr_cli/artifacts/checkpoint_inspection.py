"""Inspects checkpoints from outside a run: lists them, verifies them, and compares two of them.

`list_run` and `verify` report on a run directory or a single checkpoint. `diff` compares two
checkpoints tensor by tensor and holds two tensors in memory at a time. Nothing is changed.
state.json is read as plain JSON, so that checkpoints of other versions of dupr can be inspected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dupr_cli.artifacts.files import sha256_file
from dupr_cli.artifacts.run import (
    CHECKPOINTS,
    LATEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    RECIPE_FILE,
    STATE_FILE,
    list_checkpoints,
)
from dupr_cli.artifacts.weights import require_distinct_names
from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, read_json, read_yaml
from dupr_cli.progress import Reporter, SilentReporter
from dupr_cli.recipe import recipe_keys

ABSENT = "(absent)"

_FOLDER = re.compile(r"step-(\d+)")
_CHUNK = 2**18  # values compared at a time, to keep temporary copies small
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class CheckpointFacts:
    """One checkpoint folder. problems: empty if it is whole. latest: the run's link names it."""

    path: str
    step: int | None
    bytes: int
    written: str
    latest: bool
    problems: list[str]


@dataclass(frozen=True)
class CheckpointList:
    """The checkpoints of a run, or a single checkpoint.

    latest: the checkpoint that the run's link names, if the run has a link. leftovers: files of
    interrupted writes, and checkpoints that were set aside as damaged.
    """

    path: str
    checkpoints: list[CheckpointFacts]
    latest: str | None
    leftovers: list[str]


@dataclass(frozen=True)
class Verified:
    """What `verify` found at each address. whole: whether all checkpoints are whole."""

    whole: bool
    addresses: list[CheckpointList]


def list_run(run: Path) -> CheckpointList:
    """The checkpoints of a run, oldest first; only the sizes of their files are checked.

    Raises UsageError when the folder is not a run directory.
    """
    if not _is_run(run):
        raise _nothing_at(run)
    return _look_at_run(run, [_look_at(path, sums=False) for path in list_checkpoints(run)])


def verify(addresses: Sequence[Path], reporter: Reporter | None = None) -> Verified:
    """Read every file of the given runs and checkpoints and compare its sha256.

    Raises UsageError before reading anything when an address is neither a run nor a checkpoint.
    """
    folders = []
    for path in addresses:
        if not (_is_checkpoint(path) or _is_run(path)):
            raise _nothing_at(path)
        folders.append([path] if _is_checkpoint(path) else list_checkpoints(path))
    found = []
    say = reporter or SilentReporter()
    with say.task("verify", sum(map(len, folders)), "checkpoints") as progress:
        for address, paths in zip(addresses, folders, strict=True):
            facts = []
            for path in paths:
                facts.append(_look_at(path, sums=True))
                progress.advance()
            found.append(
                CheckpointList(str(address), facts, None, [])
                if _is_checkpoint(address)
                else _look_at_run(address, facts)
            )
    whole = not any(checkpoint.problems for listed in found for checkpoint in listed.checkpoints)
    return Verified(whole, found)


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, even one that has lost its state.json."""
    place = path.resolve()
    named = bool(_FOLDER.fullmatch(place.name)) and place.parent.name == CHECKPOINTS
    return path.is_dir() and (named or (path / STATE_FILE).is_file())


def _is_run(path: Path) -> bool:
    return (path / RECIPE_FILE).is_file() or (path / CHECKPOINTS).is_dir()


def _nothing_at(path: Path) -> UsageError:
    if not path.exists():
        return UsageError(f"{path}: the run directory or checkpoint does not exist.")
    if _is_checkpoint(path):
        return UsageError(f"{path} is a checkpoint, but a run directory is needed here.")
    return UsageError(
        f"{path} is neither a run directory ({RECIPE_FILE}, {CHECKPOINTS}/) nor a checkpoint "
        f"({STATE_FILE})."
    )


def _look_at_run(run: Path, facts: Sequence[CheckpointFacts]) -> CheckpointList:
    link = run / LATEST
    # A running training deletes old checkpoints while we inspect them.
    existing = [checkpoint for checkpoint in facts if Path(checkpoint.path).exists()]
    leftovers = [*run.glob(".*.tmp"), *(run / CHECKPOINTS).glob("damaged-step-*")]
    leftovers += [
        path
        for path in (run / CHECKPOINTS).glob("*")
        if path.suffix == ".tmp" or (path.name.startswith(".") and path.is_dir())
    ]
    target = link.readlink().name if link.is_symlink() else None
    return CheckpointList(str(run), existing, target, sorted(map(str, leftovers)))


def _look_at(path: Path, sums: bool) -> CheckpointFacts:
    files = [file for file in path.glob("*") if file.is_file()]
    clock = path / STATE_FILE if (path / STATE_FILE).exists() else path
    time = datetime.fromtimestamp(clock.stat().st_mtime if clock.exists() else 0).astimezone()
    name = _FOLDER.fullmatch(path.resolve().name)
    link = path.resolve().parent.parent / LATEST
    return CheckpointFacts(
        path=str(path),
        step=int(name[1]) if name else None,
        bytes=sum(file.stat().st_size for file in files),
        written=time.isoformat(timespec="seconds"),
        latest=link.is_symlink() and link.resolve() == path.resolve(),
        problems=_problems(path, sums),
    )


def _problems(path: Path, sums: bool) -> list[str]:
    """Problems of a checkpoint, none if it is whole. sums: also compare the sha256 of its files."""
    try:
        state = read_json(path / STATE_FILE)
        listed = {
            str(name): (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in state["files"].items()
        }
        step = int(state["step"])
    except FileNotFoundError:
        return [f"{STATE_FILE} is missing"]
    except OSError as error:
        return [f"{STATE_FILE} cannot be read: {error.strerror}"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{STATE_FILE} is cut off or damaged"]
    problems = [
        f"{STATE_FILE} does not list {name}"
        for name in (MODEL_FILE, OPTIMIZER_FILE)
        if name not in listed
    ]
    folder = _FOLDER.fullmatch(path.resolve().name)
    if folder and int(folder[1]) != step:
        problems.append(f"{STATE_FILE} is of step {step}")
    for name, (size, digest) in listed.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                problems.append(f"{name} has {found} bytes instead of {size}")
            elif sums and sha256_file(path / name) != digest:
                problems.append(f"{name} has changed: its sha256 is not the recorded one")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


@dataclass(frozen=True)
class KeyDifference:
    """A key whose value differs; `ABSENT` stands for a missing value."""

    key: str
    a: object
    b: object


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs between the two files.

    a, b: type and shape, or `ABSENT` for a missing tensor. differing: number of values that differ
    in any bit. largest: the largest absolute difference of two values, null if a value of a
    differing pair is NaN or infinite. Both are null if type or shape differ.
    """

    file: str
    name: str
    a: str
    b: str
    values: int
    differing: int | None = None
    largest: float | None = None


@dataclass(frozen=True)
class CheckpointDiff:
    """Comparison of two checkpoints. tensors: number of distinct tensors. recipe: null if a run has
    none."""

    a: str
    b: str
    identical: bool
    summary: str
    tensors: int
    differing: list[TensorDifference]
    state: list[KeyDifference]
    recipe: list[KeyDifference] | None


def diff(a: Path, b: Path, reporter: Reporter | None = None) -> CheckpointDiff:
    """Compare two checkpoints, or the newest whole ones of two runs, tensors bit for bit.

    Tensors that cannot be compared come first, then the others by falling difference. Raises
    UsageError when an address holds no whole checkpoint.
    """
    first, second = _whole_checkpoint(a), _whole_checkpoint(b)
    total, differing = _diff_tensors(first, second, reporter or SilentReporter())
    differing.sort(key=_by_size)
    recipes = [_recipe_of(path) for path in (first, second)]
    return CheckpointDiff(
        a=str(first),
        b=str(second),
        identical=not differing,
        summary=_summary(total, differing),
        tensors=total,
        differing=differing,
        state=_diff_keys(*(_state_of(path) for path in (first, second))),
        recipe=None if None in recipes else _diff_keys(*recipes),
    )


def _whole_checkpoint(path: Path) -> Path:
    if _is_checkpoint(path):
        problems = _problems(path, sums=False)
        if problems:
            raise UsageError(f"{path}: the checkpoint is damaged: {'; '.join(problems)}.")
        return path
    if not _is_run(path):
        raise _nothing_at(path)
    for folder in reversed(list_checkpoints(path)):
        if not _problems(folder, sums=False):
            return folder
    raise UsageError(f"{path}: the run has no whole checkpoint; see `dupr checkpoint list {path}`.")


def _state_of(path: Path) -> dict[str, object]:
    state = read_json(path / STATE_FILE)
    return {key: value for key, value in recipe_keys(state).items() if not key.startswith("files.")}


def _recipe_of(path: Path) -> dict[str, object] | None:
    """Dotted keys of the recipe of the run that a checkpoint lies in."""
    place = path.resolve()
    file = place.parent.parent / RECIPE_FILE
    if place.parent.name != CHECKPOINTS or not file.is_file():
        return None
    try:
        return recipe_keys(read_yaml(file))
    except ParseError as error:
        raise UsageError(f"{file}: the run's recipe is not valid YAML ({error}).") from error


def _diff_keys(a: dict[str, object] | None, b: dict[str, object] | None) -> list[KeyDifference]:
    ours, theirs = a or {}, b or {}
    return [
        KeyDifference(key, ours.get(key, ABSENT), theirs.get(key, ABSENT))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, ABSENT) != theirs.get(key, ABSENT)
    ]


def _diff_tensors(a: Path, b: Path, reporter: Reporter) -> tuple[int, list[TensorDifference]]:
    """Number of distinct tensors in the two checkpoints, and the tensors that differ."""
    total, differing = 0, []
    for file in (MODEL_FILE, OPTIMIZER_FILE):
        with _open(a / file) as ours, _open(b / file) as theirs:
            kinds = _kinds(ours), _kinds(theirs)
            names = sorted(kinds[0].keys() | kinds[1].keys())
            total += len(names)
            with reporter.task(f"compare {file}", len(names), "tensors") as progress:
                for name in names:
                    progress.advance()
                    (kind_a, values_a), (kind_b, values_b) = (
                        known.get(name, (ABSENT, 0)) for known in kinds
                    )
                    difference = TensorDifference(
                        file, name, kind_a, kind_b, max(values_a, values_b)
                    )
                    if kind_a != kind_b:
                        differing.append(difference)
                        continue
                    count, largest = compare_values(ours.get_tensor(name), theirs.get_tensor(name))
                    if count:
                        differing.append(replace(difference, differing=count, largest=largest))
    return total, differing


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _TensorFile(Protocol):
    """The used part of `safe_open`, which has no type annotations."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


def _open(path: Path) -> AbstractContextManager[_TensorFile]:
    try:
        require_distinct_names(path)
        return cast(AbstractContextManager[_TensorFile], safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ParseError) as error:
        raise UsageError(f"{path}: cannot be read as safetensors ({error}).") from error


def _kinds(opened: _TensorFile) -> dict[str, tuple[str, int]]:
    """Type and shape of every tensor as text, and its number of values, from the header."""
    names = opened.keys()
    parts = {name: opened.get_slice(name) for name in names}
    return {
        name: (f"{part.get_dtype()} {part.get_shape()}", math.prod(part.get_shape()))
        for name, part in parts.items()
    }


def compare_values(a: Tensor, b: Tensor) -> tuple[int, float | None]:
    """Number of values that differ in any bit, and the largest absolute difference.

    a, b: tensors of one shape and type. The difference is None if one of two differing values is
    NaN or infinite. NaNs with the same bits are equal; 0 and -0 differ by 0.
    """
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = _INTEGERS[a.element_size()]
    a, b = a.reshape(-1), b.reshape(-1)
    differing, distances = 0, [0.0]
    for first in range(0, len(a), _CHUNK):
        x, y = a[first : first + _CHUNK], b[first : first + _CHUNK]
        unequal = x.view(bits) != y.view(bits)
        if unequal.any():
            differing += int(unequal.count_nonzero())
            distance = (x.double() - y.double()).abs_()
            distances.append(float(distance.masked_fill_(~unequal, 0).max()))
    return differing, max(distances) if all(map(math.isfinite, distances)) else None


def _by_size(difference: TensorDifference) -> tuple[bool, float, str]:
    largest = math.inf if difference.largest is None else difference.largest
    return difference.differing is not None, -largest, difference.name


def _summary(total: int, differing: Sequence[TensorDifference]) -> str:
    if not differing:
        return f"identical bit for bit: {total} tensors"
    parts = [f"{len(differing)} of {total} tensors differ"]
    compared = [d for d in differing if d.differing is not None]
    for count, what in (
        (sum(d.b == ABSENT for d in differing), "only in the first"),
        (sum(d.a == ABSENT for d in differing), "only in the second"),
        (
            sum(d.differing is None and ABSENT not in (d.a, d.b) for d in differing),
            "of another type or shape",
        ),
    ):
        if count:
            parts.append(f"{count} {what}")
    if compared:
        worst = compared[0].largest
        amount = "is not finite" if worst is None else f"{worst:.2g}"
        parts.append(f"largest difference {amount} in {compared[0].name}")
    return ", ".join(parts)
