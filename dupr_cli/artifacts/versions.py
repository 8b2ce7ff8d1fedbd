"""Format versions, which keep dupr from misreading an artifact that a newer version wrote.

Every artifact carries `format_version`, a whole number that rises when readers of the previous
version would misread the new one. Readers check it first. An artifact without one was written
before the release of dupr 0.1, and can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dupr_cli.errors import DuprError, UsageError
from dupr_cli.parsing import ParseError, parse_json

KEY = "format_version"


class VersionError(DuprError):
    """An artifact was written by a newer dupr.

    This is not a UsageError, which readers take for damage: the artifact is whole, so nothing may
    be set aside, deleted or made again because of it.
    """

    exit_code = 2


def check_version(found: object, newest: int, where: Path | str) -> None:
    """Raises VersionError when an artifact's version is newer than what this dupr reads.

    found: the value of `format_version`, or None if it is missing. newest: the newest version that
    this dupr reads. Raises UsageError for a value that is not a version.
    """
    if found is None:
        return
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(f"{where}: its {KEY} is {found!r}, but a whole number from 1 is expected.")
    if found > newest:
        raise VersionError(
            f"{where}: its {KEY} is {found}, but this dupr reads up to {newest}. "
            f"Update dupr: pip install -U dupr-cli."
        )


def parse_record(data: bytes, newest: int, where: Path | str) -> dict[str, Any]:
    """The fields of an artifact that is one JSON object, after `check_version`.

    Raises ParseError for anything else, and as `check_version` does.
    """
    values = parse_json(data)
    if not isinstance(values, dict):
        raise ParseError("it is not a JSON object")
    check_version(values.get(KEY), newest, where)
    return values
