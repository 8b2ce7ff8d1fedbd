"""Linear classifiers on frozen features: by SGD on augmented images, or fast, on fixed features.

The first is MoCo's protocol, for numbers that compare with published tables. The second answers the
same question in minutes: logistic regression with a penalty chosen on held-out training images.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.errors import RunError
from dupr_cli.models.frozen import FrozenBackbone
from dupr_cli.probe.data import ImageSet
from dupr_cli.probe.loading import cut_view, pixels
from dupr_cli.progress import Reporter
from dupr_cli.recipe import Level, ProbeRecipe
from dupr_cli.recipe.probe import LinearSgdSection, LogisticSection
from dupr_cli.runtime.loader import load
from dupr_cli.views.geometry import random_crop

# Streams of random numbers; the last word of the seed separates them.
_ORDER, _CROP, _HELD_OUT = range(3)
_ROWS = 65536  # of features whose scores are in memory at a time


@dataclass(frozen=True)
class RandomCrops:
    """Reads a random resized crop of an image, flipped or not; from seed, epoch and image alone."""

    images: ImageSet
    size: int
    section: LinearSgdSection
    seed: int

    def __call__(self, request: tuple[int, int]) -> tuple[Tensor, int]:
        """request: epoch and position. Returns the crop, see `pixels`, and the position."""
        epoch, position = request
        image = self.images.image(position)
        random = np.random.default_rng([self.seed, epoch, position, _CROP])
        crop = random_crop(image.width, image.height, self.section, random)
        flip = bool(random.random() < self.section.flip_probability)
        return pixels(cut_view(image, crop, self.size, flip)), position


def _stack(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([view for view, _ in items]), torch.tensor([place for _, place in items])


def train_linear(
    frozen: FrozenBackbone,
    images: ImageSet,
    labels: Tensor,
    classes: int,
    recipe: ProbeRecipe,
    name: str,
    reporter: Reporter,
) -> dict[Level, nn.Linear]:
    """One linear classifier per level, each trained by SGD on the frozen features of random crops.

    labels: (N,) class numbers of the images. All levels see the same crops, but their classifiers
    are separate. Source: docs/method.md, "Linear probe".
    Raises RunError when a loss is not finite, or when the backbone changed.
    """
    section, device = recipe.sgd, frozen.device
    before = backbone_digest(frozen.network)
    torch.manual_seed(recipe.seed)
    heads = {level: _head(frozen.shape.channels[level], classes) for level in recipe.levels}
    for head in heads.values():
        head.to(device)
    lr = section.lr * section.batch_size / 256
    if section.batch_size != 256:
        reporter.info(f"{name}: lr {lr:g} at batch {section.batch_size}, {section.lr:g} at 256.")
    optimizer = torch.optim.SGD(
        [parameter for head in heads.values() for parameter in head.parameters()],
        lr=lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
    read = RandomCrops(images, recipe.images.crop, section, recipe.seed)
    labels = labels.to(device)
    with reporter.task(f"linear {name}", section.epochs * len(images), "images") as task:
        for epoch in range(section.epochs):
            now = lr * 0.1 ** sum(epoch >= milestone for milestone in section.milestones)
            optimizer.param_groups[0]["lr"] = now
            requests = _epoch(len(images), epoch, section.batch_size, recipe.seed)
            for views, positions in load(read, _stack, requests, recipe.images.workers, device):
                pooled = frozen.pooled(views, recipe.levels)
                features = {level: values.clone() for level, values in pooled.items()}
                wanted = labels[positions.to(device)]
                losses = [F.cross_entropy(heads[v](features[v]), wanted) for v in recipe.levels]
                # For a sum over levels, each classifier gets only the gradient of its own loss.
                loss = torch.stack(losses).sum()
                value = float(loss.detach()) / len(losses)
                if not math.isfinite(value):
                    raise RunError(
                        f"{name}: the loss is {value} in epoch {epoch + 1}, lr {now:g}: training "
                        f"has diverged. Lower sgd.lr."
                    )
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                task.advance(len(positions), f"epoch {epoch + 1}, loss {value:.3f}")
    if backbone_digest(frozen.network) != before:
        raise RunError(f"{name}: the backbone changed while the linear probe was trained.")
    return heads


def _epoch(count: int, epoch: int, batch_size: int, seed: int) -> list[list[tuple[int, int]]]:
    """The requests of one epoch: every image once, in a new order."""
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(count).tolist()
    return [
        [(epoch, position) for position in order[first : first + batch_size]]
        for first in range(0, count, batch_size)
    ]


def _head(channels: int, classes: int) -> nn.Linear:
    head = nn.Linear(channels, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def backbone_digest(network: nn.Module) -> str:
    """sha256 over every tensor of a network, including statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LogisticRegression:
    """Multinomial logistic regression on features scaled to mean 0 and standard deviation 1.

    mean, deviation: (C,). weights: (classes, C). bias: (classes,). All on one device.
    """

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(N, C) on any device to (N, classes)."""
        scaled = (features.to(self.mean.device) - self.mean) / self.deviation
        return F.linear(scaled, self.weights, self.bias)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    iterations: int,
    device: torch.device | None = None,
) -> LogisticRegression:
    """Minimise the mean cross-entropy plus penalty / 2 times the weights' squared norm.

    features: (N, C). labels: (N,). device: where it is computed; rows go there in blocks, so that
    features of a million images may stay on the CPU. The bias is not penalised. scikit-learn's C
    is 1 / (penalty * N).
    """
    mean, deviation = features.mean(0).to(device), features.std(0, correction=0).to(device)
    # A small number instead of 1 would make a unit that is constant in training blow up in testing.
    deviation = torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))
    weights = torch.zeros(classes, features.shape[1], device=mean.device, requires_grad=True)
    bias = torch.zeros(classes, device=mean.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        total = 0.5 * penalty * weights.square().sum()
        torch.autograd.backward(total)
        value = float(total.detach())
        for first in range(0, len(features), _ROWS):
            rows = (features[first : first + _ROWS].to(device) - mean) / deviation
            wanted = labels[first : first + _ROWS].to(device)
            scores = F.linear(rows, weights, bias)
            part = F.cross_entropy(scores, wanted, reduction="sum") / len(features)
            torch.autograd.backward(part)
            value += float(part.detach())
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return LogisticRegression(mean, deviation, weights.detach(), bias.detach())


def choose_penalty(
    features: Tensor,
    labels: Tensor,
    classes: int,
    section: LogisticSection,
    seed: int,
    device: torch.device | None = None,
) -> float:
    """The penalty whose classifier is most accurate on held-out training images.

    Among equally good penalties the largest is chosen. Other arguments are as in `fit_logistic`.
    """
    if len(section.penalties) == 1:
        return section.penalties[0]
    order = torch.from_numpy(np.random.default_rng([seed, _HELD_OUT]).permutation(len(labels)))
    count = max(1, min(len(labels) - 1, round(section.held_out * len(labels))))
    held_out, rest = order[:count], order[count:]
    best, best_right = section.penalties[0], -1
    train_features, train_labels = features[rest], labels[rest]
    for penalty in sorted(section.penalties, reverse=True):
        fitted = fit_logistic(
            train_features, train_labels, classes, penalty, section.iterations, device
        )
        right = int((_predict(fitted, features[held_out]) == labels[held_out]).sum())
        if right > best_right:
            best, best_right = penalty, right
    return best


def _predict(fitted: LogisticRegression, features: Tensor) -> Tensor:
    blocks = range(0, len(features), _ROWS)
    return torch.cat([fitted.scores(features[i : i + _ROWS]).argmax(1).cpu() for i in blocks])
