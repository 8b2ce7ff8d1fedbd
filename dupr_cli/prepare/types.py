"""What a preparation plans and returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreparePlan:
    """What a preparation will do, before it does it.

    action: begin, continue, append, replace, or nothing where the set is complete. items: images to
    read, by split.
    """

    source: str
    kind: str
    action: str
    items: dict[str, int]
    shards: int
    out: str


@dataclass(frozen=True)
class PrepareResult:
    """What a preparation left behind. samples: per split.

    task: of `--task`, which leaves blocks only; shards is then their number.
    """

    out: str
    samples: dict[str, int]
    shards: int
    bytes: int
    skipped: int
    skip_reasons: dict[str, int]
    task: str | None = None
