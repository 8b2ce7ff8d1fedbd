"""Losses, queues, batch norm in groups, encoders: each against a plain form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.artifacts.shards import open_shards
from dupr_cli.errors import UsageError
from dupr_cli.models.batch_norm import (
    GroupedBatchNorm2d,
    commit_statistics,
    drop_statistics,
    group_batch_norms,
    ungroup_batch_norms,
)
from dupr_cli.models.resnet import ResNetBackbone
from dupr_cli.pretrain.data import probe_batches
from dupr_cli.pretrain.encoders import Embeddings, Encoder, KeyQueue, momentum_update
from dupr_cli.pretrain.method import Dupr
from dupr_cli.pretrain.monitor import diagnostics
from dupr_cli.pretrain.retrieval_check import patch_retrieval
from dupr_cli.pretrain.step import (
    embed_keys,
    key_momentum,
    learning_rate,
    push_keys,
    step_generator,
)
from dupr_cli.pretrain.view_batches import View
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.recipe.pretrain import OptimizerSection
from dupr_cli.runtime.parallel import World
from dupr_cli.views.augmentation import ORDER, PARAMETERS
from dupr_cli.views.retrieval import own_ranks, share_within, shares_by_flip

Load = Callable[..., PretrainRecipe]
ALONE = World(torch.device("cpu"))


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_queue_is_first_in_first_out() -> None:
    queue = KeyQueue(6, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(6))
    start = queue.keys.clone()
    first, second, third = (unit(2, 4, seed=s) for s in (1, 2, 3))
    queue.push(first)
    assert torch.equal(queue.keys, torch.cat([first, start[2:]]))
    queue.push(second)
    queue.push(third)
    assert queue.fill() == 1
    fourth = unit(2, 4, seed=4)
    queue.push(fourth)
    assert torch.equal(queue.keys, torch.cat([fourth, second, third]))


def test_queue_goes_round_where_the_batch_does_not_divide_its_length() -> None:
    queue = KeyQueue(5, 3, torch.Generator().manual_seed(0))
    keys = unit(9, 3, seed=1)
    for first in range(0, 9, 3):
        queue.push(keys[first : first + 3])
    assert torch.equal(queue.keys, keys[[5, 6, 7, 8, 4]])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_grouped_batch_norm_is_plain_batch_norm_on_each_group(
    memory_format: torch.memory_format,
) -> None:
    x = torch.randn(12, 5, 4, 3).to(memory_format=memory_format) * 3 + 1
    grouped = nn.Sequential(nn.BatchNorm2d(5))
    group_batch_norms(grouped, 3)
    plain = [nn.BatchNorm2d(5) for _ in range(3)]
    expected = torch.cat([norm(part) for norm, part in zip(plain, x.chunk(3), strict=True)])
    assert torch.allclose(grouped(x), expected, atol=1e-6)
    norm = grouped[0]
    assert isinstance(norm, GroupedBatchNorm2d)
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(5))  # until the step is committed
    commit_statistics([grouped], ALONE)
    means = [p.running_mean for p in plain if p.running_mean is not None]
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert not torch.allclose(grouped(x), nn.BatchNorm2d(5)(x), atol=1e-3)


def test_grouped_batch_norm_is_plain_in_evaluation() -> None:
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 2, 2))
    norm.eval()
    x = torch.randn(5, 3, 2, 2)
    expected = norm(x)
    group_batch_norms(norm, 4)
    assert torch.equal(norm(x), expected)
    ungroup_batch_norms(norm)
    assert type(norm) is nn.BatchNorm2d


def test_statistics_are_the_same_however_the_batch_is_cut() -> None:
    x, norms = torch.randn(16, 3, 4, 4), []
    for parts in (1, 2, 4):
        norm = nn.BatchNorm2d(3)
        group_batch_norms(norm, 4 // parts)
        for part in x.chunk(parts):
            norm(part)
        commit_statistics([norm], ALONE)
        norms.append(norm)
    for norm in norms[1:]:
        for name, value in norm.state_dict().items():
            assert torch.allclose(value, norms[0].state_dict()[name]), name


def test_a_skipped_step_leaves_no_statistics() -> None:
    norm = nn.BatchNorm2d(3)
    group_batch_norms(norm, 2)
    norm(torch.full((4, 3, 2, 2), torch.nan))
    drop_statistics([norm])
    norm(torch.randn(4, 3, 2, 2))
    commit_statistics([norm], ALONE)
    assert all(bool(torch.isfinite(value).all()) for value in norm.state_dict().values())


def views(images: int, side: int = 32) -> View:
    """Views whose pixels are all their image's number."""
    numbers = torch.arange(images)
    pixels = numbers.byte()[:, None, None, None].expand(-1, 3, side, side).clone()
    boxes = torch.tensor([0.0, 0, side, side]).repeat(images, 1)
    boxes[:, 2:] -= numbers[:, None] % 7
    parameters = torch.zeros(images, PARAMETERS)
    parameters[:, ORDER] = -1  # no colour jitter
    return View(pixels, parameters, boxes, numbers % 2 == 0)


def test_a_keys_group_says_nothing_about_its_querys(tiny_recipe: Load) -> None:
    """With keys permuted, a key meets its query's group as often as by chance; else always."""
    groups, images, steps = 4, 16, 300
    orders: list[Tensor] = []

    class Recording(nn.Module):
        """An encoder that notes in which order it is given the images."""

        def forward(self, pixels: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
            orders.append(pixels[:, 0, 0, 0].argsort().argsort())
            return Embeddings({"res5": orders[-1][:, None]}, {})

    numbers = torch.arange(images)
    for permute, expected in ((True, 1 / groups), (False, 1.0)):
        recipe = tiny_recipe(f"method.batch_norm.permute_keys={str(permute).lower()}")
        orders.clear()
        for step in range(steps):
            found = embed_keys(
                Recording(), views(images, 2), recipe, ALONE, step_generator(0, step)
            )
            assert torch.equal(found.image["res5"][:, 0], numbers)
        group = numbers // (images // groups)
        same = torch.stack([group[order.argsort()] == group for order in orders])
        assert abs(float(same.float().mean()) - expected) < 0.03


@pytest.mark.parametrize("accumulate", [1, 2])
def test_permuted_keys_come_back_in_the_order_of_the_queries(
    tiny_recipe: Load, accumulate: int
) -> None:
    recipe = tiny_recipe(f"train.accumulate={accumulate}")
    still = tiny_recipe("method.batch_norm.permute_keys=false")
    key = Dupr(recipe).key.eval()  # evaluation: the permutation cannot change statistics
    some = views(8)
    some.pixels.random_(generator=torch.Generator().manual_seed(0))
    plain, permuted = (
        embed_keys(key, some, r, ALONE, torch.Generator().manual_seed(0)) for r in (still, recipe)
    )
    for level in plain.image:
        assert torch.allclose(plain.image[level], permuted.image[level], atol=1e-5)
    for level in plain.patch:
        assert torch.allclose(plain.patch[level], permuted.patch[level], atol=1e-5)


def test_momentum_update_by_hand() -> None:
    key, query = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * key.weight.detach() + 0.1 * query.weight.detach()
    momentum_update(key, query, 0.9)
    assert torch.allclose(key.weight, expected)


def test_key_encoder_starts_equal_and_gets_no_gradient(tiny_recipe: Load) -> None:
    model = Dupr(tiny_recipe())
    for (name, q), (_, k) in zip(
        model.query.state_dict().items(), model.key.state_dict().items(), strict=True
    ):
        assert torch.equal(q, k), name
    assert not any(p.requires_grad for p in model.key.parameters())


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_embeddings_have_unit_length_at_every_configured_level(
    tiny_recipe: Load, head: str
) -> None:
    recipe = tiny_recipe(
        "method.image.weights={res2: 1, res5: 1}",
        "method.patch.weights={res3: 1}",
        "method.patch.bins={res3: 4}",
        f"method.image.head={head}",
        f"method.patch.head={head}",
    )
    encoder = Encoder(recipe)
    boxes = torch.tensor([0.0, 0, 32, 32]).repeat(4, 1)
    found = encoder(torch.randn(4, 3, 32, 32), boxes, torch.zeros(4, dtype=torch.bool))
    assert {v: tuple(t.shape) for v, t in found.image.items()} == {"res2": (4, 16), "res5": (4, 16)}
    assert {v: tuple(t.shape) for v, t in found.patch.items()} == {"res3": (4, 16, 16)}
    for tensor in (*found.image.values(), *found.patch.values()):
        assert torch.allclose(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]), atol=1e-5)


def test_invalid_images_take_no_part_in_the_patch_loss(tiny_recipe: Load) -> None:
    recipe = tiny_recipe()
    model = Dupr(recipe)
    q = Embeddings({"res5": unit(4, 16)}, {"res4": unit(4, 4, 16, seed=1)})
    k = Embeddings({"res5": unit(4, 16, seed=2)}, {"res4": unit(4, 4, 16, seed=3)})
    valid = torch.tensor([True, False, True, False])
    losses = model.losses(q, k, valid)
    rows = valid.nonzero()[:, 0]
    kept = model.losses(q.map(lambda t: t[rows]), k.map(lambda t: t[rows]), valid[valid])
    assert torch.allclose(losses["patch/res4"], kept["patch/res4"])
    assert not torch.allclose(losses["image/res5"], kept["image/res5"])


def test_losses_of_the_parts_of_a_batch_add_up(tiny_recipe: Load) -> None:
    model = Dupr(tiny_recipe())
    q = Embeddings({"res5": unit(6, 16)}, {"res4": unit(6, 4, 16, seed=1)})
    k = Embeddings({"res5": unit(6, 16, seed=2)}, {"res4": unit(6, 4, 16, seed=3)})
    valid = torch.tensor([True, True, False, True, False, False])
    whole = model.losses(q, k, valid)
    halves = [
        model.losses(q.part(rows), k.part(rows), valid[rows], images=6, valid_images=3)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    for name, value in whole.items():
        assert torch.allclose(halves[0][name] + halves[1][name], value)


def test_total_loss_weighs_levels_and_kinds(tiny_recipe: Load) -> None:
    model = Dupr(tiny_recipe("method.image.weights={res5: 0.5}", "method.patch.weights={res4: 2}"))
    losses = {"image/res5": torch.tensor(3.0), "patch/res4": torch.tensor(5.0)}
    assert model.weighted(losses) == 0.5 * 3 + 2 * 5


def test_every_image_key_and_the_asked_number_of_patch_keys_enter(tiny_recipe: Load) -> None:
    recipe = tiny_recipe("method.patch_keys_per_image=2", "method.patch.weights={res4: 1}")
    model = Dupr(recipe)
    keys = Embeddings({"res5": unit(8, 16, seed=1)}, {"res4": unit(8, 4, 16, seed=2)})
    push_keys(model, [keys], ALONE, torch.Generator().manual_seed(0))
    assert torch.equal(model.image_queues["res5"].keys[:8], keys.image["res5"])
    pushed = model.patch_queues["res4"].keys[:16].view(8, 2, 16)
    for image in range(8):
        found = [
            [int(i) for i in (keys.patch["res4"][image] == p).all(1).nonzero()]
            for p in pushed[image]
        ]
        assert len({i for match in found for i in match}) == 2  # two different ones, of that image


def test_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    settings_ = OptimizerSection(lr=0.4, warmup_steps=4)
    rates = [learning_rate(settings_, step, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[54] == pytest.approx(0.2)
    assert rates[-1] < 1e-3
    constant = OptimizerSection(lr=0.4, schedule="constant")
    assert learning_rate(constant, 99, 100) == 0.4


def test_key_momentum_rises_to_its_end(tiny_recipe: Load) -> None:
    constant = tiny_recipe("method.momentum=0.9").method
    assert {key_momentum(constant, step, 11) for step in range(11)} == {0.9}
    rising = tiny_recipe("method.momentum=0.9", "method.momentum_end=1").method
    values = [key_momentum(rising, step, 11) for step in range(11)]
    assert (values[0], values[5], values[10]) == pytest.approx((0.9, 0.95, 1.0))
    assert values == sorted(values)
    with pytest.raises(UsageError, match=r"momentum_end is 0.5, below method.momentum 0.9"):
        tiny_recipe("method.momentum=0.9", "method.momentum_end=0.5")


def test_retrieval_counts_own_patches() -> None:
    pool = unit(50, 8)
    assert share_within(own_ranks(pool, pool), 1) == 1
    assert share_within(own_ranks(pool.roll(1, 0), pool), 1) == 0


def test_backbone_features_equal_torchvisions() -> None:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    reference = torchvision.models.resnet50()
    ours = ResNetBackbone("resnet50")
    state = reference.state_dict()
    ours.load_state_dict({n: t for n, t in state.items() if not n.startswith("fc.")})
    reference.eval()
    ours.eval()
    nodes = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
    x = torch.randn(2, 3, 64, 64)
    expected = create_feature_extractor(reference, nodes)(x)
    found = ours(x)
    for level, tensor in found.items():
        assert torch.equal(tensor, expected[level])


def test_other_bins_are_those_of_the_same_image(tiny_recipe: Load) -> None:
    model = Dupr(tiny_recipe("method.patch.weights={res4: 1}"))
    q = Embeddings({}, {"res4": unit(3, 4, 16, seed=1)})
    k = Embeddings({}, {"res4": unit(3, 4, 16, seed=2)})
    found = diagnostics(model, q, k, "patch/res4")["other_bins"]
    by_hand = [
        float(q.patch["res4"][n, i] @ k.patch["res4"][n, j])
        for n in range(3) for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    assert float(found) == pytest.approx(np.mean(by_hand), abs=1e-6)


def test_retrieval_measures_batch_norm_first(tiny_recipe: Load, tiny_shards: Path) -> None:
    """Statistics of the backbone do not matter; otherwise a random network would be a straw man."""
    recipe = tiny_recipe("data.holdout=9", "data.batch_size=9", "method.batch_norm.groups=3")
    batches = probe_batches(open_shards(str(tiny_shards), "train"), recipe)
    torch.manual_seed(0)
    backbone = ResNetBackbone("resnet18")
    found = patch_retrieval(backbone, batches, recipe.method, ALONE.device)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            nn.init.uniform_(module.running_mean, -5, 5)
    assert patch_retrieval(backbone, batches, recipe.method, ALONE.device) == found
    assert 0 < found["retrieval/res4"] < 1


def test_cases_of_retrieval_are_counted_apart() -> None:
    ranks = torch.tensor([0, 0, 3, 0, 7, 9])
    mirrored = torch.tensor([False, False, False, True, True, True])
    assert shares_by_flip(ranks, mirrored, 1) == {
        "all": 0.5, "same flip": pytest.approx(2 / 3), "opposite flip": pytest.approx(1 / 3),
    }  # fmt: skip
    assert shares_by_flip(ranks[:3], mirrored[:3], 1).keys() == {"all", "same flip"}
