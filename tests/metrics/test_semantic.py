"""Mean IoU: against figures computed by hand, a plain loop, torchmetrics and cityscapesScripts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dupr_cli.datasets.semantic import CITYSCAPES_IDS
from dupr_cli.metrics.semantic import IGNORE, confusion, semantic_scores

CLASSES = ["a", "b", "c", "d"]
Mask = NDArray[np.uint8]


def mask(*rows: list[int]) -> Mask:
    return np.array(rows, dtype=np.uint8)


def test_figures_are_those_computed_by_hand() -> None:
    truth = mask([0, 0, 1, 1], [0, IGNORE, 1, 2])
    found = mask([0, 1, 1, 1], [0, 2, 0, 2])
    scores = semantic_scores(confusion(truth, found, 4), CLASSES)
    # a: 2 of 3 + 3 - 2; b: 2 of 3 + 3 - 2; c: 1 of 1 + 1 - 1; d is nowhere.
    assert {k: v["IoU"] for k, v in scores.per_class.items()} == {
        "a": pytest.approx(50), "b": pytest.approx(50), "c": pytest.approx(100),
    }  # fmt: skip
    assert scores.metrics == {
        "mIoU": pytest.approx(200 / 3),
        "pixAcc": pytest.approx(500 / 7),
        "mAcc": pytest.approx((200 / 3 + 200 / 3 + 100) / 3),
    }


def test_class_that_is_predicted_but_never_labelled_counts_as_0() -> None:
    scores = semantic_scores(confusion(mask([0, 0]), mask([0, 3]), 4), CLASSES)
    assert scores.metrics["mIoU"] == pytest.approx((50 + 0) / 2)
    assert scores.per_class["d"] == {"IoU": 0.0}
    assert scores.metrics["mAcc"] == pytest.approx(50)


def test_pixels_that_are_not_labelled_do_not_count_whatever_is_predicted() -> None:
    truth = mask([0, 1, IGNORE, IGNORE])
    counts = [confusion(truth, mask([0, 1, *rest]), 4) for rest in ([0, 1], [2, 3], [3, 3])]
    assert all(np.array_equal(of, counts[0]) for of in counts)
    assert counts[0].sum() == 2


def test_truth_scores_100() -> None:
    truth = mask([0, 1, 2], [IGNORE, 3, 3])
    scores = semantic_scores(confusion(truth, np.where(truth == IGNORE, 1, truth), 4), CLASSES)
    assert scores.metrics == {"mIoU": 100, "pixAcc": 100, "mAcc": 100}


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixel is labelled"):
        semantic_scores(confusion(mask([IGNORE]), mask([0]), 4), CLASSES)
    with pytest.raises(ValueError, match="4 classes end at 3"):
        confusion(mask([4]), mask([0]), 4)
    with pytest.raises(ValueError, match="4 classes end at 3"):
        confusion(mask([0]), mask([IGNORE]), 4)
    with pytest.raises(ValueError, match=r"\(1, 2\) for a mask of \(1, 1\)"):
        confusion(mask([0]), mask([0, 0]), 4)


def pairs() -> st.SearchStrategy[tuple[Mask, Mask]]:
    shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
    truth, found = st.sampled_from([0, 1, 2, 3, IGNORE]), st.integers(0, 3)
    return shapes.flatmap(
        lambda shape: st.tuples(
            arrays(np.uint8, shape, elements=truth), arrays(np.uint8, shape, elements=found)
        )
    )


@given(pairs())
def test_counts_are_those_of_a_loop_over_pixels(pair: tuple[Mask, Mask]) -> None:
    truth, found = pair
    wanted = np.zeros((4, 4), dtype=np.int64)
    for of_truth, of_found in zip(truth.flat, found.flat, strict=True):
        if of_truth != IGNORE:
            wanted[of_truth, of_found] += 1
    assert np.array_equal(confusion(truth, found, 4), wanted)


def cases(classes: int, seed: int) -> Iterator[tuple[Mask, Mask]]:
    random = np.random.default_rng(seed)
    for _ in range(4):
        truth = random.integers(0, classes - 1, (30, 40), dtype=np.uint8)  # the last is nowhere
        found = np.where(random.random((30, 40)) < 0.6, truth, random.integers(0, classes - 2))
        truth[random.random((30, 40)) < 0.1] = IGNORE
        yield truth, found.astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_mean_is_that_of_torchmetrics(seed: int) -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    import torch

    total = np.zeros((7, 7), dtype=np.int64)
    oracle = torchmetrics.classification.MulticlassConfusionMatrix(7, ignore_index=IGNORE)
    index = torchmetrics.classification.MulticlassJaccardIndex(
        7, average="none", ignore_index=IGNORE
    )
    for truth, found in cases(7, seed):
        total += confusion(truth, found, 7)
        given_ = torch.from_numpy(found).long(), torch.from_numpy(truth).long()
        oracle.update(*given_)
        index.update(*given_)
    assert np.array_equal(total, oracle.compute().numpy())
    scores = semantic_scores(total, [str(i) for i in range(7)])
    each = index.compute().numpy()
    ours = [of["IoU"] for of in scores.per_class.values()]
    assert ours == pytest.approx(100 * each[: len(ours)], rel=1e-5)
    assert scores.metrics["mIoU"] == pytest.approx(100 * each[: len(ours)].mean(), rel=1e-5)


def test_mean_is_that_of_cityscapes_own_script() -> None:
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="cityscapesscripts is not installed",
        exc_type=ImportError,
    )
    ids = np.array([*range(34)])
    names, random = list(CITYSCAPES_IDS), np.random.default_rng(0)
    truth = random.choice(ids, (40, 60)).astype(np.uint8)
    measured = np.array(list(CITYSCAPES_IDS.values()))
    found = random.choice(measured[:-1], (40, 60)).astype(np.uint8)
    found = np.where((random.random((40, 60)) < 0.5) & np.isin(truth, measured), truth, found)
    script.args.evalLabels = [int(i) for i in ids]
    matrix = script.generateMatrix(script.args)
    for of_truth, of_found in zip(truth.flat, found.flat, strict=True):
        matrix[of_truth, of_found] += 1
    each = {
        name: script.getIouScoreForLabel(number, matrix, script.args)
        for name, number in CITYSCAPES_IDS.items()
    }
    numbers = np.full(256, IGNORE, dtype=np.uint8)
    numbers[measured] = range(len(measured))
    scores = semantic_scores(confusion(numbers[truth], numbers[found], len(names)), names)
    assert {k: v["IoU"] for k, v in scores.per_class.items()} == pytest.approx(
        {name: 100 * value for name, value in each.items()}
    )
    assert scores.metrics["mIoU"] == pytest.approx(100 * np.mean(list(each.values())))
