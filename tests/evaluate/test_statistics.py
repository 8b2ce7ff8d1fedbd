"""Paired differences against scipy's own test, and what the table says of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dupr_cli.artifacts.results import TrialResult, WeightsResult
from dupr_cli.evaluate.statistics import all_differences, paired_difference, summed_up


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


def test_an_interval_without_zero_is_real() -> None:
    found = paired_difference(of([10, 11, 12]), of([5, 6.1, 6.9]), "AP", ("a", "b"))
    assert found is not None
    assert found.is_real
    noisy = paired_difference(of([10, 1, 12]), of([5, 6, 7]), "AP", ("a", "b"))
    assert noisy is not None
    assert not noisy.is_real
