"""What shuffling keys is for: a leak through batch statistics, planted, exploited, and closed.

Each image is half a flat reference and half a brightness. Brightness is noise of its own in every
view, but adds up to the same secret in the query group and in the key group of the same images. A
single view says next to nothing about its partner; a network with batch norm reads the secret off
the flat half, whose normalised value is the group's mean.
Source: He et al., MoCo (arXiv 1911.05722), section 3.3, "Shuffling BN".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.models.batch_norm import group_batch_norms
from dupr_cli.pretrain.encoders import Embeddings, KeyQueue, momentum_update
from dupr_cli.pretrain.losses import info_nce
from dupr_cli.pretrain.step import embed_keys, step_generator
from dupr_cli.pretrain.view_batches import View
from dupr_cli.recipe import PretrainRecipe
from dupr_cli.runtime.parallel import World
from dupr_cli.views.augmentation import ORDER, PARAMETERS

ALONE = World(torch.device("cpu"))
IMAGES, GROUPS, STEPS = 64, 8, 800


class Network(nn.Module):
    """Small, but with a batch norm; deaf to boxes and flips."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()
        )
        self.head = nn.Linear(32, 8)
        group_batch_norms(self, GROUPS)

    def forward(self, images: Tensor, boxes: Tensor, flips: Tensor) -> Embeddings:
        pooled = self.layers(images).mean((2, 3))
        return Embeddings({"res5": F.normalize(self.head(pooled), dim=1)}, {})


def view(brightness: Tensor) -> View:
    pixels = torch.full((IMAGES, 3, 2, 4), 128.0)
    pixels[..., 2:] += brightness[:, None, None, None]
    parameters = torch.zeros(IMAGES, PARAMETERS)
    parameters[:, ORDER] = -1
    flips = torch.zeros(IMAGES, dtype=torch.bool)
    return View(pixels.clamp(0, 255).byte(), parameters, torch.zeros(IMAGES, 4), flips)


def planted_views(random: torch.Generator) -> list[View]:
    """Query and key views: noise that in each group has the same mean in both, and no more."""
    secret = 12 * torch.randn(GROUPS, 1, generator=random)
    views = []
    for _ in range(2):
        noise = 35 * torch.randn(GROUPS, IMAGES // GROUPS, generator=random)
        views.append(view((noise - noise.mean(1, keepdim=True) + secret).flatten()))
    return views


def own_key_against_others(recipe: PretrainRecipe, seed: int) -> float:
    """After training: share of other groups' keys that a query's own key beats. Chance is 0.5.

    Against the same step's keys, because those in the queue also differ by the encoder's age.
    """
    group = torch.arange(IMAGES) // (IMAGES // GROUPS)
    others = group[:, None] != group
    torch.manual_seed(seed)
    query, key = Network(), Network()
    key.load_state_dict(query.state_dict())
    queue = KeyQueue(64, 8, torch.Generator().manual_seed(0))
    optimizer, random, beaten = torch.optim.Adam(query.parameters(), 0.003), torch.Generator(), []
    for step in range(STEPS):
        first, second = planted_views(random.manual_seed(step))
        q = query(*first.for_encoder(recipe.method, torch.contiguous_format)).image["res5"]
        momentum_update(key, query, 0.5)
        k = embed_keys(key, second, recipe, ALONE, step_generator(0, step)).image["res5"]
        optimizer.zero_grad()
        torch.autograd.backward(info_nce(q, k, queue.keys, 0.2).mean())
        optimizer.step()
        if step >= STEPS - 50:
            similarity = q @ k.T
            beaten.append((similarity.diag()[:, None] > similarity)[others].float().mean())
        queue.push(k)
    return float(torch.stack(beaten).mean())


@pytest.mark.slow
def test_a_leak_through_batch_statistics_is_closed_by_shuffling_keys(
    tiny_recipe: Callable[..., PretrainRecipe],
) -> None:
    plain = tiny_recipe("method.batch_norm.permute_keys=false")
    shuffled = tiny_recipe("method.batch_norm.permute_keys=true")
    # Not every start finds the secret, and which do depends on the machine's rounding.
    found = ((seed, own_key_against_others(plain, seed)) for seed in range(8))
    seed = next((seed for seed, beaten in found if beaten > 0.65), None)  # 0.75 was seen
    assert seed is not None
    assert own_key_against_others(shuffled, seed) < 0.55  # there is nothing left to read
