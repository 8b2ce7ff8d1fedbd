"""Mean IoU of masks of 1024 x 2048 pixels with 19 classes, beside numpy's bincount by itself.

numpy counts numbers that were computed before, and as wide as it needs them: what it does is less
than any implementation can do. DUPR_MASKS sets the number of masks, 500 by default, as many as
Cityscapes has to validate on.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from dupr_cli.metrics.semantic import IGNORE, confusion, semantic_scores

MASKS = int(os.environ.get("DUPR_MASKS", "500"))
CLASSES, HEIGHT, WIDTH = 19, 1024, 2048


def masks(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Regions of 16 pixels; the prediction is right in most, and a border is not labelled."""
    random = np.random.default_rng(number)
    cells = random.integers(0, CLASSES, (HEIGHT // 16, WIDTH // 16), dtype=np.uint8)
    wrong = random.random(cells.shape) < 0.2
    found = np.where(wrong, random.integers(0, CLASSES, cells.shape), cells).astype(np.uint8)
    truth, predicted = (np.kron(of, np.ones((16, 16), np.uint8)) for of in (cells, found))
    truth[:50] = IGNORE
    return truth, predicted


def test_counting_takes_less_than_twice_the_time_of_bincount() -> None:
    total = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    seconds: dict[str, list[float]] = {"ours": [], "bincount": []}
    for number in range(MASKS):
        truth, found = masks(number)
        numbers = np.where(truth == IGNORE, CLASSES, truth).astype(np.int64) * CLASSES + found
        started = time.perf_counter()
        counts = np.bincount(numbers.ravel(), minlength=(CLASSES + 1) * CLASSES)
        counted = time.perf_counter()
        ours = confusion(truth, found, CLASSES)
        ended = time.perf_counter()
        seconds["bincount"].append(counted - started)
        seconds["ours"].append(ended - counted)
        assert np.array_equal(ours.ravel(), counts[: CLASSES * CLASSES])
        total += ours
    assert semantic_scores(total, [str(i) for i in range(CLASSES)]).metrics["mIoU"] > 50
    medians = {name: 1000 * statistics.median(of) for name, of in seconds.items()}
    print(f"\n{MASKS} masks, ms per mask: {medians}")
    if MASKS < 20:
        pytest.skip("too few masks to judge")
    assert medians["ours"] < 2 * medians["bincount"]
