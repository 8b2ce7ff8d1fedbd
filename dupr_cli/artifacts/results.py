"""The results file of an evaluation, `results.json`: metrics, data sets, weights and recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.versions import parse_record
from dupr_cli.errors import UsageError
from dupr_cli.parsing import ParseError, read_limited, validated

FORMAT_VERSION = 2
RESULTS = "results.json"
_EXPECTED = (
    "A finished folder of `dupr evaluate "
    "voc|coco|yolo|cityscapes|semantic|knn|linear|voc07-cls|patch-retrieval` holds one; the same "
    "command finishes an unfinished folder."
)


def image_ids_digest(image_ids: Iterable[str]) -> str:
    """sha256 over the image ids in order: results with the same digest used the same images."""
    return hashlib.sha256("\n".join(image_ids).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class DatasetIdentity:
    """The images that were used: the address as given, the split, and what they resolved to.

    objects: 0 if every pixel has a class.
    """

    address: str
    split: str
    images: int
    objects: int
    image_ids_sha256: str


@dataclass(frozen=True)
class TrialResult:
    """One training with one of the weights. metrics: in percent. per_class: the same by class.

    curve: intermediate measurements, with the iteration as `step`.
    """

    seed: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class WeightsResult:
    """The outcome for one of the compared weights.

    metrics, per_class: in percent, means over the trials. deviations: standard deviations of the
    metrics over the trials (n - 1), empty for a single trial. seconds: of all trials.
    """

    weights: str
    weights_sha256: str | None
    architecture: str
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    trials: list[TrialResult] = field(default_factory=list)


@dataclass(frozen=True)
class PairedDifference:
    """`first` minus `second` on the same seeds, in percent: mean and confidence interval.

    adjusted_p: of the metric that decides, corrected for the number of pairs in the table; None for
    metrics that only describe.
    """

    first: str
    second: str
    metric: str
    trials: int
    mean: float
    low: float
    high: float
    confidence: float
    adjusted_p: float | None = None

    @property
    def is_real(self) -> bool:
        """Whether this metric decides and its difference is more than chance gives."""
        return self.adjusted_p is not None and self.adjusted_p <= 1 - self.confidence


@dataclass(frozen=True)
class Results:
    """results.json as a whole.

    protocol: name of the recipe. changes: recipe keys whose values differ from the named recipe,
    with both values. leaks: test images found in pre-training data, if they were looked for.
    """

    protocol: str
    metric: str
    train: DatasetIdentity
    test: DatasetIdentity
    classes: list[str]
    results: list[WeightsResult]
    recipe: dict[str, object]
    recipe_sha256: str
    seeds: list[int]
    dupr_version: str
    environment: dict[str, object] = field(default_factory=dict)
    changes: dict[str, list[object]] = field(default_factory=dict)
    differences: list[PairedDifference] = field(default_factory=list)
    leaks: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> Path:
        path = folder / RESULTS
        write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results.json, given its path or folder. Raises UsageError for anything else."""
        file = path / RESULTS if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"{file}: the file does not exist. {_EXPECTED}")
        try:
            values = parse_record(read_limited(file), FORMAT_VERSION, file)
            missing = [f.name for f in fields(cls) if f.default is MISSING
                       and f.default_factory is MISSING and f.name not in values]  # fmt: skip
            if missing:
                raise UsageError(
                    f"{file}: not a results file of an evaluation, as {', '.join(missing)} are not "
                    f"in it. {_EXPECTED}"
                )
            return validated(cls, values)
        except (OSError, ParseError) as error:
            raise UsageError(
                f"{file}: not a results file of dupr ({error}). {_EXPECTED}"
            ) from error
