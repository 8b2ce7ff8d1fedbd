"""Accuracy of class predictions, in percent, and of the majority-class baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranking(scores: Tensor, places: int) -> Tensor:
    """The `places` best classes of each row of scores (N, classes), best first, (N, places).

    Of equal scores the lower class number comes first, on every device.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :places]


def top(ranked: Tensor, labels: Tensor, places: int) -> float:
    """Percent of rows whose label is among the first `places` of `ranked` (N, >= places)."""
    return 100 * float((ranked[:, :places] == labels[:, None]).any(1).float().mean())


def class_accuracies(ranked: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 of each class that has test images, percent."""
    right = (ranked[:, 0] == labels).double()
    totals = torch.bincount(labels, minlength=len(classes))
    hits = torch.bincount(labels, weights=right, minlength=len(classes))
    return {
        name: 100 * float(hit / total)
        for name, hit, total in zip(classes, hits, totals, strict=True)
        if total
    }


def commonest_first(train_labels: Tensor, test_labels: Tensor, classes: int) -> Tensor:
    """Majority-class baseline: the most common training classes, for every test image.

    The class numbers are (N, <= 5), as `ranking` returns them.
    """
    counts = torch.bincount(train_labels, minlength=classes).double()
    return ranking(counts[None], 5).expand(len(test_labels), -1)
