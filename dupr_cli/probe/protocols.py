"""The protocols: measure one of the weights under each of them.

A protocol turns a task (recipe, images, device) and weights into figures, all in percent, named
<level>/<column>; `chance` holds, by column, the score of the majority-class or random baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.errors import UsageError
from dupr_cli.models.compared import ComparedWeights
from dupr_cli.models.frozen import FrozenBackbone
from dupr_cli.probe import objects
from dupr_cli.probe.accuracy import class_accuracies, commonest_first, ranking, top
from dupr_cli.probe.data import LIMIT_TEST, ImageSet
from dupr_cli.probe.features import (
    Stopwatch,
    extract,
    freeze_backbone,
    measure_random,
)
from dupr_cli.probe.knn import knn_rankings
from dupr_cli.probe.linear import choose_penalty, fit_logistic, train_linear
from dupr_cli.probe.patches import ViewPairs
from dupr_cli.probe.voc_classification import classify, targets
from dupr_cli.progress import Reporter
from dupr_cli.recipe import Level, ProbeRecipe
from dupr_cli.recipe.probe import ProbeProtocol
from dupr_cli.runtime.loader import in_batches, load
from dupr_cli.views.geometry import Grid
from dupr_cli.views.pairs import ViewPairBatch
from dupr_cli.views.retrieval import (
    PairedBins,
    own_ranks,
    paired_bins,
    recoloured,
    shares_by_flip,
)

# Names of patch retrieval in results, by the case of a pair.
_CASES = {"all": "patch", "same flip": "same_flip", "opposite flip": "opposite_flip"}


@dataclass(frozen=True)
class ProbeTask:
    """The task that all weights share. For retrieval, `train` is `test`."""

    recipe: ProbeRecipe
    train: ImageSet
    test: ImageSet
    classes: list[str]
    device: torch.device

    def labels(self, images: ImageSet) -> Tensor:
        """(N,) class number of each image."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([numbers[label] for label in images.labels])


@dataclass
class Measured:
    """Figures of one of the weights, percent, by <level>/<column>; chance: by column."""

    metrics: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add_classes(self, key: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.per_class.setdefault(name, {})[key] = value

    def add_accuracies(self, level: Level, ranked: Tensor, labels: Tensor, task: ProbeTask) -> None:
        """top1, top5 and balanced of a level, from its class ranking (N, <= 5)."""
        by_class = class_accuracies(ranked, labels, task.classes)
        self.metrics[f"{level}/top1"] = top(ranked, labels, 1)
        self.metrics[f"{level}/top5"] = top(ranked, labels, 5)
        self.metrics[f"{level}/balanced"] = float(np.mean(list(by_class.values())))
        self.add_classes(f"{level}/top1", by_class)

    def add_guess(self, task: ProbeTask) -> None:
        train, test = task.labels(task.train), task.labels(task.test)
        guess = commonest_first(train, test, len(task.classes))
        by_class = class_accuracies(guess, test, task.classes)
        self.chance |= {"top1": top(guess, test, 1), "top5": top(guess, test, 5)}
        self.chance["balanced"] = float(np.mean(list(by_class.values())))


Measure = Callable[[ProbeTask, ComparedWeights, Reporter], Measured]


def _features(
    task: ProbeTask, compared: ComparedWeights, reporter: Reporter, watch: Stopwatch
) -> tuple[dict[Level, Tensor], dict[Level, Tensor]]:
    """Pooled features of the training and of the test images."""
    frozen = freeze_backbone(compared, task.recipe, task.device)
    measure_random(frozen, compared, task.train, task.recipe, reporter)
    name = compared.folder
    train = extract(frozen, task.train, task.recipe, f"{name} train", reporter)
    test = extract(frozen, task.test, task.recipe, f"{name} test", reporter)
    watch.lap("features")
    return train, test


def measure_knn(task: ProbeTask, compared: ComparedWeights, reporter: Reporter) -> Measured:
    """Accuracy of the neighbours' vote for every number of neighbours."""
    section, watch, measured = task.recipe.knn, Stopwatch(), Measured()
    train, test = _features(task, compared, reporter, watch)
    train_labels, test_labels = task.labels(task.train), task.labels(task.test)
    for level in task.recipe.levels:
        ranked = knn_rankings(
            train[level],
            train_labels,
            test[level],
            len(task.classes),
            section.neighbours,
            section.temperature,
            task.device,
        )
        for count, classes in ranked.items():
            measured.metrics[f"{level}/top1_k{count}"] = top(classes, test_labels, 1)
        measured.add_accuracies(level, ranked[section.shown], test_labels, task)
    measured.add_guess(task)
    measured.chance |= {f"top1_k{k}": measured.chance["top1"] for k in section.neighbours}
    watch.lap("vote")
    measured.seconds = watch.seconds
    return measured


def measure_linear_fast(task: ProbeTask, compared: ComparedWeights, reporter: Reporter) -> Measured:
    """Logistic regression on features computed once."""
    section, watch, measured = task.recipe.logistic, Stopwatch(), Measured()
    train, test = _features(task, compared, reporter, watch)
    labels, test_labels = task.labels(task.train), task.labels(task.test)
    classes, device = len(task.classes), task.device
    with reporter.task(f"classifiers {compared.folder}", len(train), "levels") as progress:
        for level, values in train.items():
            penalty = choose_penalty(values, labels, classes, section, task.recipe.seed, device)
            fitted = fit_logistic(values, labels, classes, penalty, section.iterations, device)
            scores = fitted.scores(test[level]).cpu()
            measured.add_accuracies(level, ranking(scores, 5), test_labels, task)
            measured.chosen[f"{level}/penalty"] = penalty
            progress.advance()
    measured.add_guess(task)
    watch.lap("classifiers")
    measured.seconds = watch.seconds
    return measured


def measure_linear(task: ProbeTask, compared: ComparedWeights, reporter: Reporter) -> Measured:
    """SGD on random crops, tested on centre crops."""
    recipe, watch, measured = task.recipe, Stopwatch(), Measured()
    frozen = freeze_backbone(compared, recipe, task.device)
    measure_random(frozen, compared, task.train, recipe, reporter)
    labels, test_labels = task.labels(task.train), task.labels(task.test)
    heads = train_linear(
        frozen, task.train, labels, len(task.classes), recipe, compared.folder, reporter
    )
    watch.lap("train")
    test = extract(frozen, task.test, recipe, f"{compared.folder} test", reporter)
    for level, head in heads.items():
        with torch.no_grad():
            scores = head(test[level].to(task.device)).cpu()
        measured.add_accuracies(level, ranking(scores, 5), test_labels, task)
    measured.add_guess(task)
    watch.lap("test")
    measured.seconds = watch.seconds
    return measured


def measure_voc07(task: ProbeTask, compared: ComparedWeights, reporter: Reporter) -> Measured:
    """mAP of one SVM per class. Classes without a test image are left out."""
    recipe, watch, measured = task.recipe, Stopwatch(), Measured()
    train, test = _features(task, compared, reporter, watch)
    train_wanted = targets(task.train.verdicts, task.classes)
    test_wanted = targets(task.test.verdicts, task.classes)
    tested = [n for n in range(len(task.classes)) if (test_wanted[:, n] == 1).any()]
    total = len(recipe.levels) * len(tested)
    with reporter.task(f"SVMs {compared.folder}", total, "classes") as progress:
        for level in recipe.levels:
            features = [F.normalize(v[level].double(), dim=1).numpy() for v in (train, test)]
            points, areas = {}, {}
            for number in tested:
                name = task.classes[number]
                score = classify(
                    features[0],
                    train_wanted[:, number],
                    features[1],
                    test_wanted[:, number],
                    recipe.svm,
                    recipe.seed,
                )
                points[name], areas[name] = score.points, score.area
                measured.chosen[f"{level}/cost/{name}"] = score.cost
                progress.advance(status=f"{level} {name}")
            measured.metrics[f"{level}/mAP"] = float(np.mean(list(points.values())))
            measured.metrics[f"{level}/mAP_area"] = float(np.mean(list(areas.values())))
            measured.add_classes(f"{level}/AP", points)
            measured.add_classes(f"{level}/AP_area", areas)
    shares = [np.mean(test_wanted[test_wanted[:, n] != 0, n] == 1) for n in tested]
    measured.chance = dict.fromkeys(("mAP", "mAP_area"), 100 * float(np.mean(shares)))
    watch.lap("svm")
    measured.seconds = watch.seconds
    return measured


def measure_retrieval(task: ProbeTask, compared: ComparedWeights, reporter: Reporter) -> Measured:
    """Patches across two views and, if the images have boxes, objects across images."""
    recipe, watch, measured = task.recipe, Stopwatch(), Measured()
    frozen = freeze_backbone(compared, recipe, task.device)
    _retrieve_patches(task, frozen, compared, reporter, measured)
    watch.lap("patches")
    if task.test.boxed is not None:
        _retrieve_objects(task, frozen, compared, reporter, measured)
        watch.lap("objects")
    measured.seconds = watch.seconds
    return measured


def _retrieve_patches(
    task: ProbeTask,
    frozen: FrozenBackbone,
    compared: ComparedWeights,
    reporter: Reporter,
    measured: Measured,
) -> None:
    recipe = task.recipe
    images = task.test.drawn(recipe.retrieval.images, recipe.seed, LIMIT_TEST)
    section, levels = recipe.retrieval, recipe.levels
    max_sigma, bins = section.blur.sigma[1], dict.fromkeys(levels, section.bins)

    def pairs() -> Iterator[ViewPairBatch]:
        read = ViewPairs(images, section, recipe.seed)
        requests = in_batches(len(images), recipe.images.batch_size)
        return load(read, ViewPairBatch.stack, requests, recipe.images.workers, task.device)

    if compared.weights is None:
        reporter.info(
            f"{compared.address}: batch-norm statistics are measured on the views of "
            f"{len(images)} images; random weights have none of their own."
        )
        frozen.measure_batch_norm(
            recoloured(batch, view, max_sigma, task.device)
            for batch in pairs()
            for view in range(2)
        )
    network = frozen.shape
    grids = {v: Grid(network.strides[v], network.first_centres[v]) for v in levels}
    found: dict[Level, list[PairedBins]] = {level: [] for level in levels}
    with reporter.task(f"views {compared.folder}", len(images), "images") as progress:
        for batch in pairs():
            for level, pair in paired_bins(
                lambda views: frozen.maps(views, levels),
                batch, bins, grids, section.views, max_sigma, task.device,
            ).items():  # fmt: skip
                found[level].append(pair)
            progress.advance(len(batch.crops))
    for level, parts in found.items():
        joined = PairedBins.join(parts)
        pool = len(joined.second)
        if pool < 2:
            raise UsageError(
                f"{task.test.address}: the views share fewer than two patches; use more images, or "
                f"lower retrieval.views.min_overlap."
            )
        ranks = own_ranks(joined.first, joined.second)
        for places in (1, 5):
            for case, share in shares_by_flip(ranks, joined.mirrored, places).items():
                name = f"{_CASES[case]}_top{places}"
                measured.metrics[f"{level}/{name}"] = 100 * share
                measured.chance[name] = 100 * min(1.0, places / pool)
        measured.chosen[f"{level}/pool"] = float(pool)


def _retrieve_objects(
    task: ProbeTask,
    frozen: FrozenBackbone,
    compared: ComparedWeights,
    reporter: Reporter,
    measured: Measured,
) -> None:
    recipe, boxed = task.recipe, task.test.boxed
    assert boxed is not None
    wanted, names, images = objects.searched_objects(boxed, recipe.data.min_object)
    if len(set(images)) < 2 or len(set(names)) < 2:
        reporter.warning(
            f"{task.test.address}: object retrieval needs objects of two classes in two images; "
            f"only patches are measured."
        )
        return
    read = objects.ObjectImages(boxed, wanted, recipe.retrieval.object_side)
    # Object images are this much larger than views; smaller batches keep the memory the same.
    larger = (recipe.retrieval.object_side / recipe.retrieval.views.size) ** 2
    size = max(1, int(recipe.images.batch_size / max(1.0, larger)))
    positions = list(wanted)
    requests = [[positions[i] for i in batch] for batch in in_batches(len(positions), size)]
    features: dict[Level, list[Tensor]] = {level: [] for level in recipe.levels}
    with reporter.task(f"objects {compared.folder}", len(positions), "images") as progress:
        for batch in load(
            read, objects.ObjectBatch.stack, requests, recipe.images.workers, task.device
        ):
            found = objects.object_features(frozen.maps, batch, recipe.levels)
            for level, values in found.items():
                features[level].append(values)
            progress.advance(len(batch.images))
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([numbers[name] for name in names], device=task.device)
    places = torch.tensor(images, device=task.device)
    for level, parts in features.items():
        shares, chances = objects.precision_at(
            torch.cat(parts), labels, places, recipe.retrieval.neighbours
        )
        for count, share in shares.items():
            measured.metrics[f"{level}/object_p{count}"] = 100 * float(share.nanmean())
            measured.chance[f"object_p{count}"] = 100 * float(chances.nanmean())
            by_class = {
                name: 100 * float(share[labels == number].nanmean())
                for name, number in numbers.items()
            }
            measured.add_classes(f"{level}/object_p{count}", by_class)


@dataclass(frozen=True)
class Protocol:
    """section: the recipe section that it reads. columns: its figures, in the order of a table."""

    measure: Measure
    section: str
    metric: Callable[[ProbeRecipe], str]
    columns: Callable[[ProbeRecipe], list[str]]


def _accuracy_columns(_: ProbeRecipe) -> list[str]:
    return ["top1", "top5", "balanced"]


PROTOCOLS: dict[ProbeProtocol, Protocol] = {
    "knn": Protocol(
        measure_knn,
        "knn",
        lambda recipe: (
            "Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018), "
            "percent: top-1 for k neighbours (k10 and so on), and for "
            f"k = {recipe.knn.shown} top-5 and the mean top-1 of the classes (balanced)"
        ),
        lambda recipe: [*(f"top1_k{k}" for k in recipe.knn.neighbours), "top5", "balanced"],
    ),
    "linear": Protocol(
        measure_linear,
        "sgd",
        lambda recipe: (
            f"Linear classification on frozen features, {recipe.sgd.epochs} epochs of SGD on "
            "random crops (MoCo's protocol), percent: top-1, top-5 and the mean top-1 of the "
            "classes (balanced)"
        ),
        _accuracy_columns,
    ),
    "linear-fast": Protocol(
        measure_linear_fast,
        "logistic",
        lambda _: (
            "Logistic regression on frozen features of centre crops (linear-fast, not MoCo's "
            "protocol), percent: top-1, top-5 and the mean top-1 of the classes (balanced)"
        ),
        _accuracy_columns,
    ),
    "voc07-cls": Protocol(
        measure_voc07,
        "svm",
        lambda _: (
            "VOC07 image classification, linear SVM per class on frozen features, percent: mAP at "
            "11 recall points, and area under the precision-recall curve (mAP_area)"
        ),
        lambda _: ["mAP", "mAP_area"],
    ),
    "patch-retrieval": Protocol(
        measure_retrieval,
        "retrieval",
        lambda recipe: (
            f"Retrieval on frozen features, percent: patches ({recipe.retrieval.bins} x "
            f"{recipe.retrieval.bins} bins, at most {recipe.retrieval.images} images) found in "
            "another view, top-1 and top-5, and top-1 of pairs whose views are both mirrored or "
            "both not (same_flip) and of the others (opposite_flip); with boxes precision@k of "
            "objects of the same class in other images (object_p)"
        ),
        lambda recipe: [
            "patch_top1",
            "patch_top5",
            "same_flip_top1",
            "opposite_flip_top1",
            *(f"object_p{k}" for k in recipe.retrieval.neighbours),
        ],
    ),
}
