"""The plan and the result of a pre-training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dupr_cli.pretrain.estimate import Estimate


@dataclass(frozen=True)
class PretrainPlan:
    """What a run will do, before it does it. estimate: a measurement, which differs every time."""

    data: str
    images: int
    held_out: int
    steps: int
    epochs: float
    device: str
    processes: int
    images_per_process: int
    estimate: Estimate = field(compare=False)
    warnings: list[str]
    out: str


@dataclass(frozen=True)
class PretrainResult:
    """The output of a finished run. metrics: the last values of metrics.jsonl. first_retrieval: of
    the held-out patches, measured before the first step, by the metrics' names."""

    run: str
    checkpoint: str
    steps: int
    metrics: dict[str, float]
    first_retrieval: dict[str, float]
