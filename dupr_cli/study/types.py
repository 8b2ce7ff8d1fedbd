"""The plan of a study."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyPlan:
    """The cells of a study, or of one of its tasks, and those that are not finished."""

    name: str
    cells: list[str]
    missing: list[str]
    out: str
