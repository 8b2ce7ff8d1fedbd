"""InfoNCE against a queue of negatives, the loss of both image and patch Re-ID."""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log of the positive's share, per query.

    queries, positives: (M, D), L2-normalised, row by row a pair; positives carry no gradient.
    negatives: (K, D), L2-normalised. Returns (M,).
    Source: docs/method.md, "Losses"; MoCo (arXiv 1911.05722), equation 1.
    """
    positive = (queries * positives).sum(1, keepdim=True)  # (M, 1)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature  # (M, 1 + K)
    return logits.logsumexp(1) - logits[:, 0]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries of `values` (N, ...) whose row is in `mask` (N,) bool; 0 if none is."""
    mask = mask.to(values.dtype)
    per_row = values.flatten(1).mean(1)
    return (per_row * mask).sum() / mask.sum().clamp(min=1)
