"""export.json: the files of an export, which a later one with --overwrite may replace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from dupr_cli import __version__
from dupr_cli.artifacts.files import leads_outside, sha256_file, write_json
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.artifacts.weights import is_weights_file
from dupr_cli.errors import UsageError
from dupr_cli.export.types import ExportResult
from dupr_cli.parsing import read_limited
from dupr_cli.runtime.output import remove, writing

RECORD = "export.json"
RECORD_VERSION = 1


def write_record(staged: Path, result: ExportResult) -> list[str]:
    """Record everything in the folder `staged`; returns the names of all its files."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    content = {k: v for k, v in asdict(result).items() if k not in ("path", "hub_url")}
    names = {path.relative_to(staged).as_posix(): sha256_file(path) for path in files}
    write_json(
        staged / RECORD,
        {
            "format_version": RECORD_VERSION,
            "dupr_version": __version__,
            **content,
            "files": names,
        },
    )
    return [*names, RECORD]


def _recorded(target: Path) -> tuple[Path, set[Path]]:
    """The record of an earlier export at `target`, a file or folder, and the files it lists."""
    folder = target if target.is_dir() else target.parent
    record = target / RECORD if target.is_dir() else target.with_suffix(f".{RECORD}")
    if folder is not target and is_weights_file(target):
        return record, {record, target}
    try:
        values = parse_record(read_limited(record), RECORD_VERSION, record)
        # A record of dupr 0.1 lists the files of each format, but not the model card's.
        names = values.get("files") or [name for of in values["formats"] for name in of["files"]]
        names = [name for name in names if not leads_outside(name)]
        if folder is not target:
            return record, {record, target}
        return record, {record, *(folder / name for name in names)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return record, set()


def require_replaceable(target: Path, files: Iterable[Path], overwrite: bool) -> None:
    """Raises UsageError when one of `files` exists and an earlier export does not own it."""
    _, replaceable = _recorded(target)
    for path in files:
        if not path.exists():
            continue
        if not overwrite:
            raise UsageError(f"{path}: this file exists. Give another --out, or --overwrite.")
        if path not in replaceable:
            raise UsageError(
                f"{path}: no earlier export wrote this file, so --overwrite keeps it. Move it "
                f"it away, or give another --out."
            )


def place(
    staged: Path, target: Path, result: ExportResult, companions: bool, overwrite: bool
) -> None:
    """Give the files their names when all are whole; remove those of an earlier export.

    target: a file for a single-file format without companions, else a folder.
    Raises UsageError when something else is in the way; then nothing changes.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    alone = [name for of in result.formats for name in of.files]
    if len(alone) == 1 and not companions and target.suffix == Path(alone[0]).suffix:
        if target.is_dir():
            raise UsageError(f"{target}: this is a folder; give a file as --out.")
        record = target.with_suffix(f".{RECORD}")
        moves = {staged / alone[0]: target, staged / RECORD: record}
        require_replaceable(target, moves.values(), overwrite)
        _move(moves)
        return
    with writing(target, "dupr export"):
        moves = {path: target / path.relative_to(staged) for path in files}
        require_replaceable(target, moves.values(), overwrite)
        _, earlier = _recorded(target)
        _move(moves)
        if overwrite:
            remove(target, earlier - set(moves.values()))


def _move(moves: dict[Path, Path]) -> None:
    for source, destination in moves.items():
        destination.parent.mkdir(parents=True, exist_ok=True)
        source.replace(destination)
