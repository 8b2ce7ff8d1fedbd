"""VOC classification: a linear SVM per class on frozen features, ranked by VOC's AP.

Features are scaled to unit length; the cost of each class's SVM is chosen by cross-validation on
the training images. Images whose objects of a class are all difficult are ignored for that class,
in training and in testing.
Source: Goyal et al. 2019, "Scaling and Benchmarking Self-Supervised Visual Representation Learning"
(arXiv 1905.01235), linear SVMs on VOC07; AP: VOC 2007 development kit, VOCevalcls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from dupr_cli.errors import UsageError
from dupr_cli.metrics.voc import average_precision
from dupr_cli.recipe.probe import SvmSection

Floats = NDArray[np.float64]
Signs = NDArray[np.int64]


@dataclass(frozen=True)
class ClassScore:
    """The score of one class, AP in percent; cost is that of its SVM, None without one."""

    points: float
    area: float
    cost: float | None


def require_scikit_learn() -> None:
    """Raises UsageError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise UsageError("voc07-cls needs scikit-learn; `pip install 'dupr-cli[probes]'`.")


def targets(verdicts: Sequence[Mapping[str, int]], classes: Sequence[str]) -> Signs:
    """(N, classes): 1 with the class, -1 without, 0 if only difficult objects have it."""
    rows = [[verdict.get(name, -1) for name in classes] for verdict in verdicts]
    return np.array(rows, dtype=np.int64).reshape(len(verdicts), len(classes))


def ranking_precision(scores: Floats, wanted: Signs) -> tuple[float, float]:
    """AP of a ranking, as fractions: at 11 recall points, and as area under the curve.

    scores: (N,). wanted: (N,) 1, -1, or 0 for ignored images. Ties keep their order. The area sums
    precision over the steps of recall, without making it monotonic.
    Source: VOC 2007 development kit, VOCevalcls; scikit-learn's average_precision_score.
    """
    counted = wanted != 0
    order = np.argsort(-scores[counted], kind="stable")
    right = (wanted[counted] == 1)[order]
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    recall = found / max(1, found[-1])
    area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    return average_precision(precision, recall, "voc07"), area


def classify(
    train: Floats, train_wanted: Signs, test: Floats, test_wanted: Signs, svm: SvmSection, seed: int
) -> ClassScore:
    """Fit the SVM of one class on training features (M, C) and rank test features (N, C) by it.

    train_wanted, test_wanted: (M,) and (N,), see `targets`. A class without two training images
    cannot be learnt: its AP is 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    counted = train_wanted != 0
    features, signs = train[counted], train_wanted[counted]
    folds = min(svm.folds, int(np.sum(signs == 1)), int(np.sum(signs == -1)))
    if folds < 2:
        return ClassScore(0.0, 0.0, None)

    def machine(cost: float) -> LinearSVC:
        weights = {1: svm.positive_weight, -1: 1.0}
        return LinearSVC(
            C=cost, class_weight=weights, dual="auto", max_iter=2000, random_state=seed % 2**32
        )

    best, best_score = svm.costs[0], -1.0
    with warnings.catch_warnings():
        # The largest costs may need more iterations; cross-validation judges the result anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for cost in svm.costs if len(svm.costs) > 1 else []:
            score = cross_val_score(
                machine(cost), features, signs, cv=folds, scoring="average_precision"
            ).mean()
            if score > best_score:
                best, best_score = cost, float(score)
        fitted = machine(best).fit(features, signs)
    points, area = ranking_precision(fitted.decision_function(test), test_wanted)
    return ClassScore(100 * points, 100 * area, best)
