"""Format versions: what keeps a dupr from misreading an artifact that a newer one wrote.

Every artifact carries `format_version`, a whole number that rises when a reader of the version
before would misunderstand it. A reader checks it before anything else. An artifact without one is
of a dupr before 0.1 was released, and opens.
"""

from __future__ import annotations

from pathlib import Path

from dupr_cli.errors import DuprError, UsageError

KEY = "format_version"


class VersionError(DuprError):
    """An artifact is of a newer dupr.

    No UsageError, which readers take for damage: the artifact is whole, and nothing may be set
    aside, deleted or made again because of this.
    """

    exit_code = 2


def check_version(found: object, newest: int, where: Path | str) -> None:
    """Raises VersionError when an artifact's version is newer than what this dupr reads.

    found: the value of `format_version`, None where there is none. newest: that this dupr reads.
    Raises UsageError for a value that is no version.
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
