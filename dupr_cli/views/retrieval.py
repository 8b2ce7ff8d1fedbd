"""Patch retrieval: test whether a patch finds itself in the other view of its image.

Feature maps of both views are pooled over their shared region. A patch of the first view is found
when, among all patches of all images' second views, its own has the highest cosine similarity.
Chance is one over the pool's size. Pairs of which one view is mirrored are harder and are also
counted apart: a network may re-identify the rest and not these. Pre-training checks itself with
this measure while it runs, and the probe measures finished weights with it.
Source: docs/method.md, "Is it learning?".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dupr_cli.recipe.base import Level
from dupr_cli.recipe.pretrain import ViewsSection
from dupr_cli.views.augmentation import recolour
from dupr_cli.views.geometry import Grid, pool_patches, shared_region_boxes
from dupr_cli.views.pairs import ViewPairBatch

_CHUNK = 2048  # queries compared with the pool at a time
_POOL = 16384  # and rows of the pool

# Images (N, C, S, S) float32 in [0, 1] to feature maps (N, C, S / stride, S / stride) by level.
Maps = Callable[[Tensor], Mapping[Level, Tensor]]


def recoloured(batch: ViewPairBatch, view: int, max_sigma: float, device: torch.device) -> Tensor:
    """One view of each image (N, C, S, S) float32 in [0, 1], recoloured and flipped."""
    return recolour(batch.views[:, view].to(device), batch.parameters[:, view], max_sigma)


@dataclass(frozen=True)
class PairedBins:
    """Bins of the regions that two views share: row i of both shows one place of one image.

    first, second: (M, C), of the first and of the second view. mirrored: (M,) bool, on the CPU,
    one of the two views is mirrored and the other is not.
    """

    first: Tensor
    second: Tensor
    mirrored: Tensor

    @staticmethod
    def join(parts: Sequence[PairedBins]) -> PairedBins:
        """The bins of several batches."""
        return PairedBins(
            torch.cat([part.first for part in parts]),
            torch.cat([part.second for part in parts]),
            torch.cat([part.mirrored for part in parts]),
        )


def paired_bins(
    maps: Maps,
    batch: ViewPairBatch,
    bins: Mapping[Level, int],
    grids: Mapping[Level, Grid],
    views: ViewsSection,
    max_sigma: float,
    device: torch.device,
) -> dict[Level, PairedBins]:
    """Bins of the region that both views share.

    bins: S of each level; its region is pooled into S x S. grids: of the levels' cells. max_sigma:
    largest blur of the recipe, pixels. Images whose views share too little contribute no rows.
    """
    boxes, valid = shared_region_boxes(batch.crops, batch.flips, views.size, views.min_overlap)
    mirrored = (batch.flips[:, 0] != batch.flips[:, 1])[valid]
    found: dict[Level, list[Tensor]] = {level: [] for level in bins}
    for view in range(2):
        features = maps(recoloured(batch, view, max_sigma, device))
        for level, side in bins.items():
            pooled = pool_patches(
                features[level],
                boxes[:, view].to(device),
                batch.flips[:, view].to(device),
                side,
                grids[level],
            )
            found[level].append(pooled[valid.to(device)].flatten(0, 1))
    return {
        level: PairedBins(first, second, mirrored.repeat_interleave(bins[level] ** 2))
        for level, (first, second) in found.items()
    }


def own_ranks(queries: Tensor, pool: Tensor) -> Tensor:
    """(M,) number of other rows of `pool` (M, C) at least as similar to a query as its own row.

    queries: (M, C). The rank is 0 if the most similar row is the query's own. Equal similarities
    count against it, so that constant features find nothing.
    """
    queries, pool = F.normalize(queries, dim=1), F.normalize(pool, dim=1)
    ranks = []
    for first in range(0, len(queries), _CHUNK):
        query = queries[first : first + _CHUNK]
        places = torch.arange(first, first + len(query), device=query.device)
        own = (query * pool[places]).sum(1, keepdim=True)
        count = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        for start in range(0, len(pool), _POOL):
            block = query @ pool[start : start + _POOL].T
            # A sum and a matrix product may round the same product differently.
            rivals = block >= own - 1e-6
            inside = (places >= start) & (places < start + block.shape[1])
            rivals[inside.nonzero()[:, 0], (places - start)[inside]] = False
            count += rivals.sum(1)
        ranks.append(count)
    return torch.cat(ranks)


def share_within(ranks: Tensor, places: int) -> float:
    """Share of the queries whose own patch is among the `places` most similar."""
    return float((ranks < places).double().mean())


def shares_by_flip(ranks: Tensor, mirrored: Tensor, places: int) -> dict[str, float]:
    """`share_within` of "all" pairs, of those with the "same flip" and with the "opposite flip".

    ranks: see `own_ranks`. mirrored: see `PairedBins`. A case that does not occur is absent.
    """
    mirrored = mirrored.to(ranks.device)
    cases = {"all": ranks, "same flip": ranks[~mirrored], "opposite flip": ranks[mirrored]}
    return {case: share_within(some, places) for case, some in cases.items() if len(some)}
