"""The plan of an evaluation, whose result is `artifacts.results.Results`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluatePlan:
    """What an evaluation will do, before it does it.

    train_images: all that have labels, if several numbers of labels (label_counts) are compared.
    """

    protocol: str
    changes: dict[str, list[object]]
    metric: str
    weights: list[str]
    architectures: list[str]
    loaded: list[str]
    train_images: int
    test_images: int
    classes: list[str]
    iterations: int
    epochs: float
    seeds: list[int]
    device: str
    processes: int
    notes: list[str]
    out: str
    label_counts: list[int] = field(default_factory=list)
