"""Paired differences against scipy's own test, and what the table says of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dupr_cli.artifacts.results import TrialResult, WeightsResult
from dupr_cli.evaluate.statistics import all_differences, holm, paired_difference, summed_up


def of(values: list[float], first_seed: int = 0) -> WeightsResult:
    trials = [
        TrialResult(first_seed + i, {"AP": v, "AP50": v, "AP75": v}, {}, {"train": 1.0})
        for i, v in enumerate(values)
    ]
    return summed_up("w", None, "resnet18", "01-w", trials)


scores = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=8))
def test_interval_is_that_of_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    found = paired_difference(of(a), of(b), "AP", ("a", "b"))
    assert found is not None
    differences = np.subtract(a, b)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)
    if differences.std() > 1e-6:
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


def test_means_and_deviations_over_trials() -> None:
    row = of([10, 12, 17])
    assert row.metrics["AP"] == 13
    assert row.deviations["AP"] == pytest.approx(np.std([10, 12, 17], ddof=1))
    assert row.seconds["train"] == 3


def test_only_common_seeds_are_paired() -> None:
    found = paired_difference(of([1, 2, 3, 4], 0), of([1, 1, 1], 2), "AP", ("a", "b"))
    assert found is not None
    assert found.trials == 2
    assert found.mean == pytest.approx(2.5)


def test_one_trial_gives_no_interval() -> None:
    assert of([5]).deviations == {}
    assert all_differences([of([5]), of([6])], ["a", "b"]) == []


def test_every_pair_is_compared() -> None:
    rows = [of([1, 2]), of([3, 5]), of([4, 4])]
    found = all_differences(rows, ["a", "b", "c"])
    pairs = {(d.first, d.second) for d in found}
    assert pairs == {("a", "b"), ("a", "c"), ("b", "c")}


def test_the_deciding_metric_has_the_p_of_the_paired_t_test() -> None:
    a, b = [10.0, 11, 12, 9.5], [9.0, 10.6, 10.9, 9.4]
    (ap, ap50, ap75) = all_differences([of(a), of(b)], ["a", "b"])
    assert ap.adjusted_p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (ap50.adjusted_p, ap75.adjusted_p) == (None, None)
    assert not ap50.is_real


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_that_of_the_definition(values: list[float]) -> None:
    adjusted = holm(values)
    count = len(values)
    ranked = sorted(values)
    for value, found in zip(values, adjusted, strict=True):
        upto = [min(1, (count - i) * p) for i, p in enumerate(ranked) if p <= value]
        assert found == pytest.approx(max(upto))


def test_a_clear_difference_is_real_and_a_noisy_one_is_not() -> None:
    (clear, *_) = all_differences([of([10, 11, 12]), of([5, 6.1, 6.9])], ["a", "b"])
    assert clear.is_real
    (noisy, *_) = all_differences([of([10, 1, 12]), of([5, 6, 7])], ["a", "b"])
    assert not noisy.is_real


def test_equal_weights_are_called_different_in_few_tables() -> None:
    """Three weights of the same quality, five seeds: simulated tables with the noise we measured.

    The fault behind this: each of nine intervals decided by itself, and a third of the tables
    called something real.
    """
    random = np.random.default_rng(0)
    tables, flagged, by_interval = 2000, 0, 0
    for _ in range(tables):
        seeds = random.normal(0, 1, 5)
        rows = []
        for _ in range(3):
            ap = 10 + seeds + random.normal(0, 0.6, 5)
            other = ap[:, None] + random.normal(0, 0.6, (5, 2))
            trials = [
                TrialResult(i, {"AP": ap[i], "AP50": a, "AP75": b}, {}, {"train": 1.0})
                for i, (a, b) in enumerate(other)
            ]
            rows.append(summed_up("w", None, "resnet18", "01-w", trials))
        found = all_differences(rows, ["a", "b", "c"])
        flagged += any(difference.is_real for difference in found)
        by_interval += any(d.low > 0 or d.high < 0 for d in found)
    assert flagged / tables < 0.06  # 5 % and three deviations of 2,000 draws
    assert by_interval / tables > 0.2
