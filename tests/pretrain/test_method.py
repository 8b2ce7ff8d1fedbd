"""Losses, queues, batch norm in groups, encoders: each against a plain form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.backbones import ResNetBackbone
from dupr_cli.pretrain.encoders import (
    Embeddings,
    Encoder,
    GroupedBatchNorm2d,
    KeyQueue,
    group_batch_norms,
    momentum_update,
)
from dupr_cli.pretrain.probe import top1_retrieval
from dupr_cli.pretrain.trainer import (
    Dupr,
    Views,
    embed_keys,
    learning_rate,
    push_keys,
    reid_losses,
    step_generator,
    total_loss,
)
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.recipe.pretrain import OptimizerSection

Load = Callable[..., PretrainRecipe]


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
    fourth = unit(2, 4, seed=4)
    queue.push(fourth)
    assert torch.equal(queue.keys, torch.cat([fourth, second, third]))


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


def test_a_keys_group_says_nothing_about_its_querys() -> None:
    """With keys permuted, a key meets its query's group as often as by chance; else always."""
    groups, images, steps = 4, 16, 300
    orders = []

    def record(views: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
        """An encoder that notes in which order it is given the images."""
        orders.append(views[:, 0, 0, 0].long())
        return Embeddings({"res5": views[:, :1, 0, 0]}, {})

    numbers = torch.arange(images)
    views = Views(numbers.float()[:, None, None, None], torch.zeros(images, 4), numbers > 0)
    for permute, expected in ((True, 1 / groups), (False, 1.0)):
        orders.clear()
        for step in range(steps):
            found = embed_keys(record, views, permute, step_generator(0, step))  # type: ignore[arg-type]
            assert torch.equal(found.image["res5"][:, 0].long(), numbers)
        group = numbers // (images // groups)
        same = torch.stack([group[order.argsort()] == group for order in orders])
        assert abs(float(same.float().mean()) - expected) < 0.03


def test_permuted_keys_come_back_in_the_order_of_the_queries(tiny_recipe: Load) -> None:
    model = Dupr(tiny_recipe()).eval()  # evaluation: the permutation cannot change statistics
    views = Views(
        torch.randn(8, 3, 32, 32),
        torch.tensor([0.0, 0, 32, 32]).repeat(8, 1) - torch.arange(8.0)[:, None],
        torch.arange(8) % 2 == 0,
    )
    generator = torch.Generator().manual_seed(0)
    plain = embed_keys(model.key, views, False, generator)
    permuted = embed_keys(model.key, views, True, generator)
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
    losses = reid_losses(model, q, k, valid, recipe.method)
    kept = reid_losses(
        model,
        q.select(valid.nonzero()[:, 0]),
        k.select(valid.nonzero()[:, 0]),
        valid[valid],
        recipe.method,
    )
    assert torch.allclose(losses["patch/res4"], kept["patch/res4"])
    assert not torch.allclose(losses["image/res5"], kept["image/res5"])


def test_total_loss_weighs_levels_and_kinds(tiny_recipe: Load) -> None:
    recipe = tiny_recipe("method.image.weights={res5: 0.5}", "method.patch.weights={res4: 2}")
    losses = {"image/res5": torch.tensor(3.0), "patch/res4": torch.tensor(5.0)}
    assert total_loss(losses, recipe.method) == 0.5 * 3 + 2 * 5


def test_every_image_key_and_the_asked_number_of_patch_keys_enter(tiny_recipe: Load) -> None:
    recipe = tiny_recipe("method.patch_keys_per_image=2", "method.patch.weights={res4: 1}")
    model = Dupr(recipe)
    keys = Embeddings({"res5": unit(8, 16, seed=1)}, {"res4": unit(8, 4, 16, seed=2)})
    push_keys(model, keys, 2, torch.Generator().manual_seed(0))
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


def test_retrieval_counts_own_patches() -> None:
    pool = unit(50, 8)
    assert top1_retrieval(pool, pool) == 1
    assert top1_retrieval(pool.roll(1, 0), pool) == 0


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
