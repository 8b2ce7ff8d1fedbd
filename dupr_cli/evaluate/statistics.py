"""Whether a difference is real: trials summarised, and weights compared seed by seed.

Trials of different weights with the same seed share their images, their order, their heads and
their sampled regions, so their difference varies less than either result. One metric, named
beforehand, decides; over all pairs of weights its chance of calling any difference real that is
none is at most 1 - CONFIDENCE.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, stdev

from dupr_cli.artifacts.results import PairedDifference, TrialResult, WeightsResult
from dupr_cli.metrics.semantic import CLASS_ACCURACY, MEAN_IOU, PIXEL_ACCURACY

CONFIDENCE = 0.95


def compared_metrics(metrics: Collection[str]) -> tuple[str, str, str]:
    """The metrics to compare weights by; masks and keypoints have their AP in the place of AP75.

    The first decides. The others are not independent of it: each would be one more chance to call
    noise a difference.
    """
    if MEAN_IOU in metrics:
        return (MEAN_IOU, PIXEL_ACCURACY, CLASS_ACCURACY)
    if "keypoint_AP" in metrics:
        return ("AP", "AP50", "keypoint_AP")
    if "cityscapes_AP" in metrics:
        return ("AP", "segm_AP", "cityscapes_AP")
    return ("AP", "AP50", "segm_AP") if "segm_AP" in metrics else ("AP", "AP50", "AP75")


def summed_up(
    weights: str, sha256: str | None, architecture: str, folder: str, trials: Sequence[TrialResult]
) -> WeightsResult:
    """Means and standard deviations over the trials of one of the weights."""
    metrics = _means([trial.metrics for trial in trials])
    classes = {name for trial in trials for name in trial.per_class}
    per_class = {
        name: _means([trial.per_class[name] for trial in trials if name in trial.per_class])
        for name in sorted(classes)
    }
    deviations = {}
    if len(trials) > 1:
        deviations = {m: stdev(trial.metrics[m] for trial in trials) for m in metrics}
    seconds = {k: sum(trial.seconds[k] for trial in trials) for k in trials[0].seconds}
    return WeightsResult(
        weights=weights,
        weights_sha256=sha256,
        architecture=architecture,
        metrics=metrics,
        per_class=per_class,
        seconds=seconds,
        extra={"folder": folder},
        deviations=deviations,
        trials=list(trials),
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: fmean(row[name] for row in rows) for name in names}


def paired_difference(
    first: WeightsResult, second: WeightsResult, metric: str, names: tuple[str, str]
) -> PairedDifference | None:
    """The mean difference over the seeds that both have, with Student's interval.

    None with fewer than two such seeds: one difference does not show how much it varies.
    """
    by_seed = {trial.seed: trial.metrics for trial in second.trials}
    differences = [
        trial.metrics[metric] - by_seed[trial.seed][metric]
        for trial in first.trials
        if trial.seed in by_seed and metric in trial.metrics
    ]
    count = len(differences)
    if count < 2:
        return None
    from scipy.stats import t  # half a second to import

    mean, error = fmean(differences), stdev(differences) / math.sqrt(count)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return PairedDifference(*names, metric, count, mean, mean - reach, mean + reach, CONFIDENCE)


def p_value(found: PairedDifference) -> float:
    """Two-sided p of the paired t-test: how often chance alone gives such a difference."""
    from scipy.stats import t

    reach = found.high - found.mean
    if reach == 0:
        return float(found.mean == 0)
    quantile = float(t.ppf((1 + found.confidence) / 2, found.trials - 1))
    return 2 * float(t.sf(abs(found.mean) * quantile / reach, found.trials - 1))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        adjusted[i] = largest
    return adjusted


def all_differences(
    results: Sequence[WeightsResult], names: Sequence[str]
) -> list[PairedDifference]:
    """Every pair of weights, in the order given, by `compared_metrics`. names: of the weights.

    The p-values of the metric that decides are corrected for the number of pairs.
    """
    found = [
        paired_difference(results[a], results[b], metric, (names[a], names[b]))
        for a, b in combinations(range(len(results)), 2)
        for metric in compared_metrics(results[0].metrics)
    ]
    differences = [difference for difference in found if difference is not None]
    primary = compared_metrics(results[0].metrics)[0]
    deciding = [i for i, difference in enumerate(differences) if difference.metric == primary]
    adjusted = holm([p_value(differences[i]) for i in deciding])
    for i, value in zip(deciding, adjusted, strict=True):
        differences[i] = replace(differences[i], adjusted_p=value)
    return differences
