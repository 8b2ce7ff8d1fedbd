"""The trainer against the reference step, number by number over three steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dupr_cli import pretrain
from dupr_cli.artifacts.run import MetricsLog, list_checkpoints
from dupr_cli.artifacts.shards import open_shards
from dupr_cli.pretrain.data import training_batches
from dupr_cli.pretrain.step import make_model, step_generator
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.runtime.parallel import World
from tests.reference.pretrain_step import Draws, Reference, Settings
from tests.support.images import write_grainy_shards

pytestmark = pytest.mark.slow

Load = Callable[..., PretrainRecipe]
ALONE = World(torch.device("cpu"))
STEPS = 3
# Relative, of losses, by step: each step of a random network multiplies rounding.
TOLERANCE = (2e-5, 2e-4, 1e-3)
# Of weights, relative to how far they have moved: 0.009, 0.04 and 0.14 on a CPU without AVX-512.
APART = (0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def grainy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grainy_shards(tmp_path_factory.mktemp("grainy"))


# Every value differs from every other that it could be mistaken for, and from its default.
COMMON = (
    "model.backbone=resnet18",
    "method.views.size=64",
    "method.views.min_overlap=0.5",
    "method.views.overlap_attempts=1",
    "method.patch.bins={res4: 3, res5: 2}",
    "method.image.weights={res2: 0.2, res3: 0.3, res4: 0.6, res5: 1.1}",
    "method.patch.weights={res4: 0.8, res5: 1.2}",
    "method.image.temperature=0.25",
    "method.patch.temperature=0.15",
    "method.momentum=0.9",
    "method.queue_length=48",
    "method.batch_norm.groups=2",
    "optimizer.lr=0.0002",
    "optimizer.momentum=0.7",
    "optimizer.weight_decay=0.1",
    "optimizer.warmup_steps=2",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
    "train.probe_every=100",
)


def settings_of(recipe: PretrainRecipe) -> Settings:
    method = recipe.method
    return Settings(
        size=method.views.size,
        min_overlap=method.views.min_overlap,
        max_sigma=method.augmentation.blur.sigma[1],
        mean=method.augmentation.mean,
        std=method.augmentation.std,
        alpha={str(v): w for v, w in method.image.weights.items()},
        beta={str(v): w for v, w in method.patch.weights.items()},
        bins={str(v): n for v, n in method.patch.bins.items()},
        image_temperature=method.image.temperature,
        patch_temperature=method.patch.temperature,
        groups=method.batch_norm.groups,
        permute_keys=method.batch_norm.permute_keys,
        patch_keys=method.patch_keys_per_image,
        symmetric=method.symmetric,
        sgd_momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.weight_decay,
    )


def rates() -> list[float]:
    """A warm-up of two steps to 0.0002, then a cosine over the one step that is left."""
    return [0.0001, 0.0002, 0.0002]


def momenta(recipe: PretrainRecipe) -> list[float]:
    """Half a cosine from 0.9 to 0.99 over three steps, where the recipe asks for it."""
    return [0.9, 0.945, 0.99] if recipe.method.momentum_end else [0.9, 0.9, 0.9]


def draws_of(recipe: PretrainRecipe, shards: Path) -> list[Draws]:
    loader, _ = training_batches(open_shards(str(shards), "train"), recipe, 0, ALONE)
    found = []
    for step, (batch, lr) in enumerate(zip(loader, rates(), strict=False)):
        generator = step_generator(recipe.seed, step)
        directions = 2 if recipe.method.symmetric else 1
        count = len(batch.views)
        patches = max(bins * bins for level, bins in recipe.method.patch.bins.items()
                      if recipe.method.patch.weights.get(level))  # fmt: skip
        orders = [torch.arange(count)] * directions
        if recipe.method.batch_norm.permute_keys:
            orders = [torch.randperm(count, generator=generator) for _ in range(directions)]
        scores = [torch.rand(count, patches, generator=generator) for _ in range(directions)]
        found.append(
            Draws(
                batch.views,
                batch.crops,
                batch.parameters,
                orders,
                scores,
                lr,
                momenta(recipe)[step],
            )
        )
        if step + 1 == STEPS:
            break
    loader.close()
    return found


def difference(found: Tensor, wanted: Tensor, start: Tensor) -> float:
    """How far apart two values are, relative to how far the wanted one has moved."""
    moved = float((wanted - start).double().norm())
    apart = float((found - wanted).double().norm())
    # Rounding of the value itself; what does not move must not move.
    return max(0.0, apart - 3e-7 * float(wanted.double().norm())) / max(moved, 1e-12)


@pytest.mark.parametrize(
    "more",
    [
        (),
        (
            "method.symmetric=true",
            "train.accumulate=2",
            "method.batch_norm.groups=4",
            "data.batch_size=16",
        ),
        (
            "method.patch_keys_per_image=2",
            "method.batch_norm.permute_keys=false",
            "method.momentum_end=0.99",
        ),
    ],
    ids=["plain", "symmetric in parts", "two patch keys, ordered, rising momentum"],
)
def test_three_steps_are_those_of_the_reference(
    tiny_recipe: Load, grainy_shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    recipe = tiny_recipe(*COMMON, *more)
    start = {n: t.clone() for n, t in make_model(recipe, ALONE).state_dict().items()}
    reference = Reference(start, settings_of(recipe))
    out = tmp_path / "run"
    pretrain.run(recipe, str(grainy_shards), out, device="cpu")
    logged = [line for line in MetricsLog(out).read() if "loss" in line]
    for step, draws in enumerate(draws_of(recipe, grainy_shards)):
        losses = reference.step(draws)
        close = TOLERANCE[step]
        assert logged[step]["loss"] == pytest.approx(losses.pop("loss"), rel=close)
        for name, value in losses.items():
            assert logged[step][f"loss/{name}"] == pytest.approx(value, rel=close), (step, name)
        assert logged[step]["lr"] == pytest.approx(draws.lr)
        state = load_file(list_checkpoints(out)[step] / "model.safetensors")
        for side, network in (("query", reference.query), ("key", reference.key)):
            for name, wanted in network.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    full = f"{side}.{name}"
                    apart = difference(state[full], wanted, start[full])
                    assert apart < APART[step], (step, full, apart)
        for name, queue in reference.queues.items():
            full = f"{name.replace('/', '_queues.')}.keys"
            assert torch.allclose(state[full], queue, atol=20 * close), (step, full)
