"""OUT/.prepare: the files of an unfinished preparation, and their removal.

state.json    what is being prepared: recipe, source and its digest
listing.json  listing/  source.jsonl.gz    the images of the source (`listing`)
excluded.json                              the images that are left out (`exclusion`)
blocks/       finished blocks (`blocks`)
plan.json  skipped.jsonl  records.bin      the assembly under way (`assembly`)
unpacked/     compressed archives as plain tars
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dupr_cli import __version__
from dupr_cli.artifacts.files import write_json
from dupr_cli.parsing import read_json, validated
from dupr_cli.runtime.output import remove

_STATE = "state.json"
_FILES = (
    "plan.json", "listing.json", "skipped.jsonl", "notes.jsonl", "source.jsonl.gz", "records.bin",
    "excluded.json", "*.lock", ".*.tmp", "listing/*.jsonl", "listing/*.starts",
    "listing/*.bucket-*", "blocks/*.tar", "blocks/*.index.json", "blocks/*.records",
    "blocks/*-*.json", "blocks/.*.tmp", "unpacked/*.tar", "unpacked/*.lock", "unpacked/.*.tmp",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """state.json. digest: of the source. appends: only new images are added to an existing set.

    excluded: digest of the images of `exclude`, empty without it.
    """

    recipe: dict[str, Any]
    kind: str
    source: str
    digest: str
    labelled: bool
    appends: bool = False
    excluded: str = ""
    dupr_version: str = __version__
    format_version: int = 1

    def write(self, folder: Path) -> None:
        write_json(folder / _STATE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """The state in `folder`, or None if nothing is being prepared."""
        try:
            values = dict(read_json(folder / _STATE))
            if "fingerprint" in values:  # dupr 0.1: digest of the recipe, then that of the names
                values["digest"] = values.pop("fingerprint").rpartition("-")[2]
                values.pop("recipe_digest", None)
            return validated(cls, values)
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def clear(folder: Path, only: str = "") -> None:
    """Remove what a preparation wrote into `folder`; the state goes last, as the mark of the rest.

    only: a subfolder; everything else then stays.
    """
    files = (path for pattern in _FILES for path in folder.glob(pattern))
    if only:
        remove(folder, [path for path in files if path.parent == folder / only])
        return
    folders = [folder, *(folder / name for name in ("listing", "blocks", "unpacked"))]
    remove(folder.parent, [*files, folder / _STATE], folders)
