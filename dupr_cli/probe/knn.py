"""Nearest neighbours: training images vote on the class of a test image; nothing is trained.

A test image's k nearest training images by cosine similarity s vote with weight exp(s / T).
Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(arXiv 1805.01978), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.probe.accuracy import ranking

_QUERIES, _BANK = 1024, 16384  # rows compared at a time: 64 MiB of similarities


def nearest(
    queries: Tensor, bank: Tensor, count: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine similarity and row of the `count` most similar rows of `bank`, most similar first.

    queries: (N, C). bank: (M, C), M >= count. Both results are (N, count). The N x M similarities
    are computed in blocks and never stored, on `device` if one is given.
    """
    # Normalise before the transfer, so that a GPU holds the bank only once.
    queries, bank = (F.normalize(rows, dim=1).to(device) for rows in (queries, bank))
    similarities, rows = [], []
    for start in range(0, len(queries), _QUERIES):
        query = queries[start : start + _QUERIES]
        best = query.new_empty(len(query), 0)
        where = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for first in range(0, len(bank), _BANK):
            block = query @ bank[first : first + _BANK].T
            numbers = torch.arange(first, first + block.shape[1], device=query.device)
            joined = torch.cat([best, block], 1)
            best, chosen = joined.topk(min(count, joined.shape[1]), dim=1)
            where = torch.cat([where, numbers.expand(len(query), -1)], 1).gather(1, chosen)
        similarities.append(best)
        rows.append(where)
    return torch.cat(similarities), torch.cat(rows)


def vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes of each class, (N, classes).

    similarities: (N, k) of the neighbours. labels: (N, k) their classes.
    """
    # Relative to the nearest: this keeps the ranking, and a small temperature does not overflow.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    scores = similarities.new_zeros(len(similarities), classes)
    return scores.scatter_add_(1, labels, weights)


def knn_rankings(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    classes: int,
    neighbours: Sequence[int],
    temperature: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """For each number of neighbours the best (up to five) classes of every test image, best first.

    train: (M, C), train_labels: (M,) class numbers, test: (N, C). Results are (N, <= 5).
    Numbers of neighbours above M stand for M. device: where it is computed; results are on the CPU.
    """
    found = nearest(test, train, min(max(neighbours), len(train)), device)
    similarities, rows = (values.cpu() for values in found)
    labels = train_labels[rows]
    results = {}
    for count in neighbours:
        parts = []
        for first in range(0, len(test), _QUERIES):
            block = slice(first, first + _QUERIES), slice(count)
            votes = vote(similarities[block], labels[block], classes, temperature)
            parts.append(ranking(votes, 5))
        results[count] = torch.cat(parts)
    return results
