"""`labels-saved.json`: AP by number of labels for each of the weights, and the labels saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, read_limited, validated

FORMAT_VERSION = 1
LABELS_SAVED = "labels-saved.json"


@dataclass(frozen=True)
class CurvePoint:
    """A metric of one of the weights with a number of labels, in percent.

    values: of each seed. low, high: confidence interval of the mean; equal to it for one seed.
    """

    labels: int
    mean: float
    low: float
    high: float
    values: dict[int, float]

    @property
    def band(self) -> tuple[float, float]:
        """The interval as it is drawn: Student's of few seeds may leave the range of percents."""
        return min(100.0, max(0.0, self.low)), min(100.0, max(0.0, self.high))


@dataclass(frozen=True)
class LabelsNeeded:
    """How many labels some weights need for what the baseline reaches with `baseline_labels`.

    needed: interpolated; None if it is below the smallest or above the largest number of labels
    that was tried, which `beyond` tells (less, more). low, high: confidence interval, None where it
    leaves the tried numbers.
    """

    weights: str
    baseline_labels: int
    target: float
    needed: float | None
    beyond: str
    low: float | None
    high: float | None

    def described(self, curves: LabelCurves) -> str:
        """The number in words, with its interval: 61 [52, 78], or fewer than 50."""
        counts = [point.labels for point in next(iter(next(iter(curves.curves.values())).values()))]
        if self.needed is None:
            return f"fewer than {counts[0]}" if self.beyond == "less" else f"more than {counts[-1]}"
        figure = f"{self.needed:.0f}"
        if len(curves.seeds) == 1:
            return figure
        low = f"<{counts[0]}" if self.low is None else f"{self.low:.0f}"
        high = f">{counts[-1]}" if self.high is None else f"{self.high:.0f}"
        return f"{figure} [{low}, {high}]"


@dataclass(frozen=True)
class LabelCurves:
    """labels-saved.json as a whole. curves: by metric and name of the weights. saved: by metric.

    weights: address of each name. folders: of each evaluation, by number of labels.
    """

    protocol: str
    metric: str
    baseline: str
    confidence: float
    weights: dict[str, str]
    curves: dict[str, dict[str, list[CurvePoint]]]
    saved: dict[str, list[LabelsNeeded]]
    folders: dict[int, str]
    test_images: int
    seeds: list[int]
    notes: list[str]
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        write_json(folder / LABELS_SAVED, asdict(self))

    @classmethod
    def read(cls, path: Path) -> LabelCurves:
        """Read labels-saved.json, given its path or folder. Raises UsageError for anything else."""
        file = path / LABELS_SAVED if path.is_dir() else path
        try:
            return validated(cls, parse_record(read_limited(file), FORMAT_VERSION, file))
        except (OSError, ParseError) as error:
            raise UsageError(
                f"{file}: not a comparison over numbers of labels ({error}). `dupr evaluate ... "
                f"--labels 50,100,all` writes one when it ends."
            ) from error
