"""Nearest neighbours, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import neighbors

from dupr_cli.probe import knn
from dupr_cli.probe.knn import knn_rankings, nearest, vote
from tests.support.features import clusters


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(20, 80),
    k=st.integers(1, 20),
    classes=st.integers(2, 7),
)
def test_weighted_vote_is_that_of_scikit_learn(seed: int, count: int, k: int, classes: int) -> None:
    train, labels = clusters(seed, count, classes)
    test, _ = clusters(seed + 1, 15, classes)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train.double().numpy(), labels.numpy())
    shares = theirs.predict_proba(test.double().numpy())
    similarities, rows = nearest(test, train, k)
    votes = vote(similarities, labels[rows], classes, 0.07).double()
    ours = votes / votes.sum(1, keepdim=True)
    assert np.allclose(ours.numpy(), shares, atol=1e-3)
    ranked = knn_rankings(train, labels, test, classes, [k], 0.07)[k]
    # Where scikit-learn's two best are not all but equal, the first place is the same.
    best = np.sort(shares, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert (ranked[:, 0].numpy() == theirs.predict(test.double().numpy()))[clear].all()


def test_plain_vote_is_that_of_scikit_learn() -> None:
    # Three neighbours of two classes: no ties, which scikit-learn may break otherwise.
    train, labels = clusters(3, 200, 2)
    test, _ = clusters(4, 100, 2)
    theirs = neighbors.KNeighborsClassifier(3, metric="cosine", algorithm="brute")
    theirs.fit(train.numpy(), labels.numpy())
    ranked = knn_rankings(train, labels, test, 2, [3], temperature=1e6)[3]
    assert ranked[:, 0].tolist() == theirs.predict(test.numpy()).tolist()


def test_blocks_do_not_change_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = clusters(5, 150, 3)
    test, _ = clusters(6, 40, 3)
    whole = nearest(test, train, 12)
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_BANK", 5)  # fewer rows than neighbours
    parts = nearest(test, train, 12)
    assert torch.equal(parts[1], whole[1])
    assert torch.allclose(parts[0], whole[0], atol=1e-6)


def test_more_neighbours_than_images_is_all_of_them() -> None:
    train, labels = clusters(7, 10, 3)
    ranked = knn_rankings(train, labels, train, 3, [10, 200], 0.07)
    assert torch.equal(ranked[10], ranked[200])


def test_a_small_temperature_does_not_overflow() -> None:
    votes = vote(torch.tensor([[1.0, 0.5]]), torch.tensor([[1, 0]]), 2, 1e-4)
    assert torch.isfinite(votes).all()
    assert votes[0, 1] > votes[0, 0]
