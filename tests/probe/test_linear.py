"""Linear classifiers, against scikit-learn's and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dupr_cli.errors import RunError
from dupr_cli.models.compared import open_compared
from dupr_cli.probe import linear
from dupr_cli.probe.data import open_classified
from dupr_cli.probe.features import freeze_backbone
from dupr_cli.probe.linear import (
    backbone_digest,
    choose_penalty,
    fit_logistic,
    train_linear,
)
from dupr_cli.progress import SilentReporter
from dupr_cli.recipe import ProbeRecipe
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.probe import LogisticSection
from tests.support.class_images import HUES, class_folders, probe_recipe
from tests.support.features import clusters
from tests.support.reporters import Listening

CPU = torch.device("cpu")


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_is_that_of_scikit_learn(
    penalty: float, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn import linear_model as models

    monkeypatch.setattr(linear, "_ROWS", 37)  # in several blocks
    features, labels = clusters(1, 120, classes)
    features = features * torch.linspace(0.1, 30, 8) + 3
    ours = fit_logistic(features, labels, classes, penalty, 500)
    scaled = ((features - ours.mean) / ours.deviation).double().numpy()
    assert np.allclose(scaled.mean(0), 0, atol=1e-4)
    assert np.allclose(scaled.std(0), 1, atol=1e-4)
    theirs = models.LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=2000)
    shares = theirs.fit(scaled, labels.numpy()).predict_proba(scaled)
    if classes == 2:
        # One weight vector w there, -w/2 and w/2 here: half the squared norm, a penalty of half.
        ours = fit_logistic(features, labels, classes, 2 * penalty, 500)
    assert np.allclose(ours.scores(features).softmax(1).numpy(), shares, atol=2e-3)


def test_a_feature_that_is_constant_in_training_does_no_harm() -> None:
    features, labels = clusters(2, 60, 3)
    features[:, 2] = 7.0
    fitted = fit_logistic(features, labels, 3, 1e-3, 50)
    features[:, 2] = 7.1
    assert torch.isfinite(fitted.scores(features)).all()
    assert fitted.scores(features).abs().max() < 100


def test_penalty_is_chosen_against_learning_by_heart() -> None:
    """As many dimensions as images, a quarter of the labels wrong: they can all be fitted."""
    random = np.random.default_rng(0)
    labels = torch.tensor(random.integers(0, 2, 500))
    features = torch.tensor(random.normal(size=(500, 300)), dtype=torch.float32)
    features[:, :3] += 3 * labels[:, None]
    noisy = torch.where(torch.tensor(random.random(500) < 0.25), 1 - labels, labels)
    section = LogisticSection(penalties=[1e-6, 0.3], held_out=0.3)
    assert choose_penalty(features, noisy, 2, section, seed=0) == 0.3


def test_equally_good_penalties_give_the_largest() -> None:
    features = torch.cat([torch.randn(40, 3) + 20, torch.randn(40, 3) - 20])
    labels = torch.arange(80) // 40
    section = LogisticSection(penalties=[1e-4, 1e-1, 1e-2])
    assert choose_penalty(features, labels, 2, section, seed=0) == 1e-1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(class_folders(tmp_path_factory.mktemp("set") / "tree"))


def trained(recipe: ProbeRecipe, folders: str) -> tuple[dict[str, nn.Linear], list[str]]:
    (candidate,) = open_compared(["none"], "resnet18")
    images = open_classified(folders, "train", 8, SilentReporter())
    labels = torch.tensor([sorted(HUES).index(label) for label in images.labels])
    frozen = freeze_backbone(candidate, recipe, CPU)
    reporter = Listening()
    before = backbone_digest(frozen.network)
    heads = train_linear(frozen, images, labels, 3, recipe, "x", reporter)
    assert backbone_digest(frozen.network) == before
    return {str(level): head for level, head in heads.items()}, reporter.said


def test_levels_are_trained_as_if_alone(folders: str) -> None:
    together, _ = trained(probe_recipe("linear", levels=["res4", "res5"]), folders)
    alone, _ = trained(probe_recipe("linear", levels=["res4"]), folders)
    # The second head of `together` draws its start after the first one's.
    assert torch.allclose(together["res4"].weight, alone["res4"].weight, rtol=1e-4, atol=1e-5)


def test_lr_is_scaled_with_the_batch_and_said(folders: str) -> None:
    _, said = trained(probe_recipe("linear"), folders)
    assert any("lr 1.875 at batch 16, 30 at 256" in line for line in said)


def test_divergence_is_said(folders: str) -> None:
    recipe = probe_recipe("linear", sgd={"epochs": 2, "milestones": [], "lr": 1e38})
    with pytest.raises(RunError, match=r"diverged.*sgd\.lr"):
        trained(recipe, folders)


def test_a_backbone_that_changes_is_noticed(folders: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dupr_cli.models.frozen import FrozenBackbone

    computed = FrozenBackbone.pooled

    def careless(self: FrozenBackbone, images: torch.Tensor, levels: list[Level]) -> object:
        self.network.train()
        return computed(self, images, levels)

    monkeypatch.setattr(FrozenBackbone, "pooled", careless)
    with pytest.raises(RunError, match="the backbone changed"):
        trained(probe_recipe("linear"), folders)
