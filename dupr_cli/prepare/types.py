"""The plan and the result of a preparation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PreparePlan:
    """What a preparation will do, before it does it.

    action: begin, continue, append, replace, or nothing if the set is complete. items: images to
    read, by split. notes: what the source holds that is not read. excluded: number of images of
    each set whose copies will be left out.
    """

    source: str
    kind: str
    action: str
    items: dict[str, int]
    shards: int
    out: str
    notes: list[str] = field(default_factory=list)
    excluded: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PrepareResult:
    """What a preparation has written. samples: per split.

    task: the value of `--task`, which writes blocks only; `shards` is then their number. excluded:
    how many of the skipped images are copies of excluded ones, None if the recipe excludes none.
    """

    out: str
    samples: dict[str, int]
    shards: int
    bytes: int
    skipped: int
    skip_reasons: dict[str, int]
    task: str | None = None
    excluded: int | None = None
