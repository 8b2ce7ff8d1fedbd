"""The input and the plan of a probe, whose result is `artifacts.results.Results`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeData:
    """The image sets. test_data: another set to test on. A split of None stands for the set's only
    split."""

    address: str
    train_split: str = "train"
    test_split: str | None = "val"
    test_data: str | None = None


@dataclass(frozen=True)
class ProbePlan:
    """What a probe will do, before it does it."""

    protocol: str
    metric: str
    weights: list[str]
    architectures: list[str]
    levels: list[str]
    train_images: int
    test_images: int
    classes: list[str]
    device: str
    out: str
