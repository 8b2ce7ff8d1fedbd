"""Held-out patch retrieval during a run, see `views.retrieval`.

Two fixed views of every held-out image are cut, with all augmentation. Batch-norm statistics are
measured on the same views first: otherwise a random network, whose statistics are untouched, would
be a straw man.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dupr_cli.models.batch_norm import measured_statistics, ungroup_batch_norms
from dupr_cli.recipe.base import LEVEL_STRIDES, LEVELS, Level
from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.views.augmentation import normalise
from dupr_cli.views.pairs import ViewPairBatch
from dupr_cli.views.retrieval import own_ranks, paired_bins, recoloured, share_within


def retrieval_levels(method: MethodSection) -> list[Level]:
    """Levels that are probed: those with a patch loss, or res4 and res5 if none has one."""
    return [v for v in LEVELS if method.patch.weights.get(v)] or ["res4", "res5"]


@torch.no_grad()
def patch_retrieval(
    backbone: nn.Module,
    batches: Sequence[ViewPairBatch],
    method: MethodSection,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 retrieval per level, as retrieval/<level>, and the pool size; empty without batches.

    The backbone is copied, so neither its statistics nor its mode change.
    """
    if not batches:
        return {}
    network = copy.deepcopy(backbone)
    ungroup_batch_norms(network)  # evaluate with the statistics of whole batches
    max_sigma, levels = method.augmentation.blur.sigma[1], retrieval_levels(method)
    cells = {level: max(1, method.views.size // LEVEL_STRIDES[level]) for level in levels}
    bins = {level: method.patch.bins.get(level, cells[level]) for level in levels}

    def maps(images: Tensor) -> Mapping[Level, Tensor]:
        found: Mapping[Level, Tensor] = network(normalise(images, method.augmentation), levels)
        return found

    with measured_statistics(network):
        for batch in batches:
            for view in range(2):
                maps(recoloured(batch, view, max_sigma, device))
    patches: dict[Level, list[tuple[Tensor, Tensor]]] = {level: [] for level in levels}
    for batch in batches:
        for level, pair in paired_bins(maps, batch, bins, method.views, max_sigma, device).items():
            patches[level].append(pair)
    results = {}
    for level, pairs in patches.items():
        first, second = (torch.cat([pair[view] for pair in pairs]) for view in range(2))
        results[f"retrieval/{level}"] = share_within(own_ranks(first, second), 1)
        results[f"retrieval_pool/{level}"] = float(len(second))
    return results
