"""Held-out patch retrieval: does a patch find itself again in the other view of its image?

For every held-out image two fixed views are cut, with all augmentation. The backbone's feature maps
(before the heads) are pooled over the shared region; a patch of the first view counts when, among
all patches of all images' second views, the nearest by cosine similarity is its own. Chance is one
over the pool's size. Batch-norm statistics are measured anew on the same views first: otherwise a
random network, whose statistics are untouched, would be a straw man.
Source: docs/method.md, "Is it learning?".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dupr_cli.models.batch_norm import ungroup_batch_norms
from dupr_cli.pretrain.data import ViewPairBatch
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.views.augmentation import FLIP, augment
from dupr_cli.views.geometry import pool_patches, shared_region_boxes

_CHUNK = 4096  # queries compared with the pool at a time


def retrieval_levels(method: MethodSection) -> list[Level]:
    """Levels that are probed: those with a patch loss, or res4 and res5 where there is none."""
    return [v for v in LEVELS if method.patch.weights.get(v)] or ["res4", "res5"]


def top1_retrieval(queries: Tensor, pool: Tensor) -> float:
    """Share of rows of `queries` (M, C) whose most similar row of `pool` (M, C) is their own."""
    queries, pool = F.normalize(queries, dim=1), F.normalize(pool, dim=1)
    nearest = [
        (queries[first : first + _CHUNK] @ pool.T).argmax(1)
        for first in range(0, len(queries), _CHUNK)
    ]
    own = torch.arange(len(queries), device=queries.device)
    return float((torch.cat(nearest) == own).float().mean())


@torch.no_grad()
def patch_retrieval(
    backbone: nn.Module,
    batches: Sequence[ViewPairBatch],
    method: MethodSection,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 retrieval per level, as retrieval/<level>, and the pool's size. Empty without batches.

    The backbone is copied: neither its statistics nor its mode change.
    """
    if not batches:
        return {}
    network = copy.deepcopy(backbone)
    ungroup_batch_norms(network)  # whole batches: statistics to evaluate with
    _measure_batch_norm(network, batches, method, device)
    levels = retrieval_levels(method)
    patches: dict[Level, tuple[list[Tensor], list[Tensor]]] = {v: ([], []) for v in levels}
    for batch in batches:
        flips = batch.parameters[..., FLIP].bool()
        boxes, valid = shared_region_boxes(
            batch.crops, flips, method.views.size, method.views.min_overlap
        )
        for view in range(2):
            images = _augmented(batch, view, method, device)
            features = network(images, levels)
            for level in levels:
                cells = images.shape[-1] // LEVEL_STRIDES[level]
                pooled = pool_patches(
                    features[level],
                    boxes[:, view].to(device),
                    flips[:, view].to(device),
                    method.patch.bins.get(level, max(1, cells)),
                    LEVEL_STRIDES[level],
                )
                patches[level][view].append(pooled[valid.to(device)].flatten(0, 1))
    results = {}
    for level in levels:
        first, second = (torch.cat(parts) for parts in patches[level])
        results[f"retrieval/{level}"] = top1_retrieval(first, second)
        results[f"retrieval_pool/{level}"] = float(len(second))
    return results


def _augmented(
    batch: ViewPairBatch, view: int, method: MethodSection, device: torch.device
) -> Tensor:
    images = batch.views[:, view].to(device)
    return augment(images, batch.parameters[:, view], method.augmentation)


def _measure_batch_norm(
    network: nn.Module,
    batches: Sequence[ViewPairBatch],
    method: MethodSection,
    device: torch.device,
) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean over the batches
    network.train()
    for batch in batches:
        for view in range(2):
            network(_augmented(batch, view, method, device))
    network.eval()
