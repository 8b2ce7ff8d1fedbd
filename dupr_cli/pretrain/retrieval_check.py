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

from dupr_cli.artifacts.run import retrieval_rose
from dupr_cli.models.backbone import as_backbone
from dupr_cli.models.batch_norm import measured_statistics, ungroup_batch_norms
from dupr_cli.pretrain.encoders import grid
from dupr_cli.recipe.base import LEVELS, Level
from dupr_cli.recipe.pretrain import MethodSection
from dupr_cli.views.augmentation import normalise
from dupr_cli.views.pairs import ViewPairBatch
from dupr_cli.views.retrieval import (
    PairedBins,
    own_ranks,
    paired_bins,
    recoloured,
    shares_by_flip,
)

# Names in metrics.jsonl, by the case of a pair.
RETRIEVAL = {
    "all": "retrieval",
    "same flip": "retrieval_same_flip",
    "opposite flip": "retrieval_opposite_flip",
}


def retrieval_levels(method: MethodSection) -> list[Level]:
    """Levels that are probed: those with a patch loss, or res4 and res5 if none has one."""
    return [v for v in LEVELS if method.patch.weights.get(v)] or ["res4", "res5"]


def describe_retrieval(shares: Mapping[str, float], level: str) -> str:
    """The shares that `patch_retrieval` measured at a level: 12.3% (same flip 17.0%, ...)."""
    found = {
        case: f"{100 * shares[f'{name}/{level}']:.1f}%"
        for case, name in RETRIEVAL.items()
        if f"{name}/{level}" in shares
    }
    whole = found.pop("all")
    cases = ", ".join(f"{case} {share}" for case, share in found.items())
    return f"{level} {whole}" + (f" ({cases})" if cases else "")


def short_retrieval(shares: Mapping[str, float]) -> str:
    """The shares of all pairs at all measured levels, for a status: retrieval res4 12% res5 9%."""
    begin = f"{RETRIEVAL['all']}/"
    found = [
        f"{name.removeprefix(begin)} {100 * share:.0f}%"
        for name, share in shares.items()
        if name.startswith(begin)
    ]
    return " ".join(["retrieval", *found])


def learned(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """Whether patches are found again more often than by the random network of the start.

    first, last: shares of all pairs by their names in metrics.jsonl, last also with the numbers of
    patches; empty text without them. The rule is that of `dupr report`.
    """
    better: list[str] = []
    not_better: list[str] = []
    for name, start in first.items():
        end = last[name]
        level = name.removeprefix(f"{RETRIEVAL['all']}/")
        rose = retrieval_rose(start, end, last.get(f"retrieval_pool/{level}"))
        kind = better if rose else not_better
        kind.append(f"{level} {100 * start:.1f}% -> {100 * end:.1f}%")
    parts = []
    if better:
        parts.append(f"more than at the start: {', '.join(better)}")
    if not_better:
        parts.append(f"not clearly more than at the start: {', '.join(not_better)}")
    return "; ".join(parts)


@torch.no_grad()
def patch_retrieval(
    backbone: nn.Module,
    batches: Sequence[ViewPairBatch],
    method: MethodSection,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 retrieval per level, and the pool size; empty without batches.

    retrieval/<level> is of all pairs, retrieval_same_flip/<level> of those whose views are mirrored
    alike, retrieval_opposite_flip/<level> of the others. Bins are pooled where the backbone's cells
    are centred, whatever `method.patch.cell_centres` trains with, so that runs can be compared.
    The backbone is copied, so neither its statistics nor its mode change.
    """
    if not batches:
        return {}
    network = copy.deepcopy(backbone)
    ungroup_batch_norms(network)  # evaluate with the statistics of whole batches
    max_sigma, levels = method.augmentation.blur.sigma[1], retrieval_levels(method)
    shape = as_backbone(backbone)
    grids = {level: grid(backbone, level, "backbone") for level in levels}
    cells = {level: max(1, method.views.size // shape.strides[level]) for level in levels}
    bins = {level: method.patch.bins.get(level, cells[level]) for level in levels}

    def maps(images: Tensor) -> Mapping[Level, Tensor]:
        found: Mapping[Level, Tensor] = network(normalise(images, method.augmentation), levels)
        return found

    with measured_statistics(network):
        for batch in batches:
            views = [recoloured(batch, view, max_sigma, device) for view in range(2)]
            # The deepest map of one small image is one cell, which alone has no variance.
            alone = len(views[0]) == 1 and min(cells.values()) == 1
            for images in [torch.cat(views)] if alone else views:
                maps(images)
    patches: dict[Level, list[PairedBins]] = {level: [] for level in levels}
    for batch in batches:
        found = paired_bins(maps, batch, bins, grids, method.views, max_sigma, device)
        for level, pairs in found.items():
            patches[level].append(pairs)
    results = {}
    for level, parts in patches.items():
        joined = PairedBins.join(parts)
        ranks = own_ranks(joined.first, joined.second)
        for case, share in shares_by_flip(ranks, joined.mirrored, 1).items():
            results[f"{RETRIEVAL[case]}/{level}"] = share
        results[f"retrieval_pool/{level}"] = float(len(joined.second))
    return results
