"""What a report says in plain words: does a run learn, and what helps the detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dupr_cli.artifacts.label_curves import LabelCurves
from dupr_cli.artifacts.results import PairedDifference, Results
from dupr_cli.artifacts.run import retrieval_rose
from dupr_cli.report.sources import Named, Run
from dupr_cli.study.report import StudyReport

GOOD, OPEN, BAD = "good", "open", "bad"
_COLLAPSED = 0.02  # spread, as the monitor of a run
_WAITING = 0.2  # share of the time spent waiting for data that is worth a word
CASES = {
    "retrieval": "all pairs",
    "retrieval_same_flip": "mirrored alike",
    "retrieval_opposite_flip": "one mirrored",
}


@dataclass(frozen=True)
class Finding:
    """One sentence or two. verdict: good, open or bad, which the page shows as a mark."""

    verdict: str
    text: str


@dataclass(frozen=True)
class RetrievalRow:
    """Held-out patch retrieval of a run at a level, in percent: the untrained network's, and the
    last. better: whether the last is higher by more than chance. patches: of all pairs."""

    run: str
    level: str
    case: str
    untrained: float
    last: float
    step: int
    patches: int | None
    better: bool

    @property
    def factor(self) -> str:
        """How many times the untrained network's."""
        return f"{self.last / self.untrained:.1f} x" if self.untrained else ""


def retrieval_rows(run: Run) -> list[RetrievalRow]:
    """Every level and case that a run measured twice or more."""
    rows = []
    names = sorted({name for line in run.lines for name in line if name.startswith("retrieval/")})
    for level in (name.partition("/")[2] for name in names):
        pool = run.last(f"retrieval_pool/{level}")
        half = None if pool is None else pool / 2  # views are mirrored alike in about half of them
        for prefix, case in CASES.items():
            points = run.points(f"{prefix}/{level}")
            if len(points) < 2 or points[0][0] != 0:
                continue
            first, (step, last) = points[0][1], points[-1]
            rows.append(
                RetrievalRow(
                    run.title,
                    level,
                    case,
                    100 * first,
                    100 * last,
                    int(step),
                    None if pool is None or case != CASES["retrieval"] else int(pool),
                    retrieval_rose(first, last, pool if case == CASES["retrieval"] else half),
                )
            )
    return rows


def run_findings(run: Run) -> list[Finding]:
    """Does this run learn?"""
    name = f"Run {run.title}"
    if not run.lines:
        return [Finding(OPEN, f"{name} has not logged a step yet.")]
    rows = retrieval_rows(run)
    overall = [row for row in rows if row.case == CASES["retrieval"]]
    if not overall:
        return [
            Finding(
                OPEN,
                f"{name}: held-out patch retrieval has not been measured after the start, so it is "
                f"not known whether the run learns.",
            )
        ]
    better = [row for row in overall if row.better]
    figures = "; ".join(
        f"{row.level} {row.untrained:.1f} % to {row.last:.1f} %" for row in (better or overall)
    )
    step = overall[0].step
    if not better:
        return [
            Finding(
                BAD,
                f"{name} is not seen to learn: at step {step:,} it finds patches again in another "
                f"view not clearly more often than the same network before training ({figures}).",
            )
        ]
    found = [
        Finding(
            GOOD,
            f"{name} learns: at step {step:,} it finds more patches again in another view of their "
            f"image than the same network before training ({figures}).",
        )
    ]
    flat = sorted(
        {
            row.level
            for row in rows
            if row.case == CASES["retrieval_opposite_flip"] and not row.better
        }
    )
    if flat:
        found.append(
            Finding(
                OPEN,
                f"{name}: where one of two views is mirrored, patches are not found clearly more "
                f"often than before training at {', '.join(flat)}.",
            )
        )
    return found


def deciding(results: Results) -> list[PairedDifference]:
    """The differences of the metric that decides; of AP if none does."""
    found = [each for each in results.differences if each.adjusted_p is not None]
    return found or [each for each in results.differences if each.metric == "AP"]


def _what(metric: str) -> str:
    return "a better segmentation" if metric == "mIoU" else "a better detector"


def results_findings(named: Named[Results]) -> list[Finding]:
    """What helps the detector of an evaluation?"""
    results = named.content
    if results.leaks:
        leak = Finding(
            BAD,
            f"{named.name}: {len(results.leaks)} test images are in pre-training data, so its "
            f"figures may be too high.",
        )
        return [leak, *_comparison_findings(named)]
    return _comparison_findings(named)


def _comparison_findings(named: Named[Results]) -> list[Finding]:
    results = named.content
    if len(results.results) < 2:
        return [Finding(OPEN, f"{named.name} has one set of weights, so nothing is compared.")]
    differences = deciding(results)
    if not differences:
        return [
            Finding(
                OPEN,
                f"{named.name} has {len(results.seeds)} seed: any difference between its weights "
                f"may be chance. `--seeds 5` shows the spread.",
            )
        ]
    real = [_pair_finding(named.name, results, each) for each in differences if each.is_real]
    return real + _not_told_apart(named.name, results, [d for d in differences if not d.is_real])


def _not_told_apart(
    name: str, results: Results, pairs: Sequence[PairedDifference]
) -> list[Finding]:
    """One sentence about all pairs whose difference may be chance."""
    if not pairs:
        return []
    listed = "; ".join(
        f"{pair.first} minus {pair.second} is {pair.mean:+z.1f} "
        f"[{pair.low:+z.1f}, {pair.high:+z.1f}]"
        for pair in pairs
    )
    return [
        Finding(
            OPEN,
            f"{name}: these differences of {pairs[0].metric} may be chance, with {pairs[0].trials} "
            f"seeds and {results.train.images} labelled images: {listed}.",
        )
    ]


def _pair_finding(name: str, results: Results, pair: PairedDifference) -> Finding:
    """A difference that is more than chance."""
    better, worse = pair.first, pair.second
    mean, low, high = pair.mean, pair.low, pair.high
    if mean < 0:
        better, worse = worse, better
        mean, low, high = -mean, -high, -low
    random = {entry.extra.get("folder") for entry in results.results if not entry.weights_sha256}
    return Finding(
        BAD if better in random else GOOD,
        f"{name}: {better} gives {_what(pair.metric)} than {worse}: {mean:+z.1f} {pair.metric} "
        f"[{low:+z.1f}, {high:+z.1f}], {pair.trials} seeds, {results.train.images} labelled "
        f"images. This is more than chance.",
    )


def labels_findings(named: Named[LabelCurves]) -> list[Finding]:
    """How many labels are saved, by the first metric and at the largest number of labels?"""
    curves, found = named.content, []
    metric, rows = next(iter(curves.saved.items()), ("", []))
    # The largest number says most; the page has the table of all.
    most = max((row.baseline_labels for row in rows), default=0)
    for row in rows:
        if row.baseline_labels == most:
            surely = row.high is not None and row.high < row.baseline_labels
            found.append(
                Finding(
                    GOOD if surely else OPEN,
                    f"{named.name}: with {most} labels {curves.baseline} reaches {row.target:.1f} "
                    f"{metric}; {row.weights} needs {row.described(curves)} labels for that.",
                )
            )
    return found


def study_findings(named: Named[StudyReport]) -> list[Finding]:
    """What beats the baseline of a study?"""
    found = []
    for protocol in named.content.protocols:
        for count, differences in protocol.differences.items():
            for each in differences:
                if each.metric != protocol.decides:
                    continue
                interval = f"{each.mean:+z.1f} [{each.low:+z.1f}, {each.high:+z.1f}]"
                verdict = "more than chance" if each.is_real else "may be chance"
                found.append(
                    Finding(
                        GOOD if each.is_real and each.mean > 0 else OPEN,
                        f"{named.name}, {protocol.name}, {count} labels: {each.first} minus "
                        f"{each.second} is {interval} {each.metric}; {verdict}.",
                    )
                )
    return found


def warnings(run: Run) -> list[str]:
    """What is worth a look in the log and the history of a run."""
    name, found = f"Run {run.title}", []
    bad = run.last("bad_steps")
    if bad:
        found.append(
            f"{name}: {bad:.0f} steps had a loss or gradient that was not finite and were skipped."
        )
    unreadable = sum(line.get("unreadable", 0.0) for line in run.lines)
    if unreadable:
        found.append(
            f"{name}: {unreadable:.0f} times, an image could not be decoded and another took its "
            f"place."
        )
    for place, value in run.last_of("spread/").items():
        if value < _COLLAPSED:
            found.append(
                f"{name}: the embeddings collapse; {place} is {value:.3f}, and healthy is near 1."
            )
    waits = [line["data_wait"] for line in run.lines if "data_wait" in line]
    if waits and sum(waits) / len(waits) > _WAITING:
        found.append(
            f"{name}: {100 * sum(waits) / len(waits):.0f} % of the time went into waiting for "
            f"data. More data.workers, or smaller images in the shards, would make it faster."
        )
    for change in run.environment.get("changes", []):
        found.append(
            f"{name}: {change.get('key')} was changed during the run, from "
            f"{change.get('before')} to {change.get('after')}."
        )
    return found
