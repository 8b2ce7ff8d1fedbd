"""InfoNCE against a queue of negatives, the loss of both image and patch Re-ID.

The negatives' term is logsumexp(q K^T / T), and its gradient in q is softmax(q K^T / T) K / T: the
output of attention with values K. Attention kernels give both, so one fused pass over the queue
yields loss and gradient. The (queries x keys) logits never exist, and the queue, which carries no
gradient, needs no backward pass. `info_nce_plain` writes the same out in full, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

# Keys per block of the streamed form: with 1,568 queries, the logits take 3 MB and stay near cache.
_BLOCK = 512
# A kernel whose trial result is further than this from float64 is not used.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def info_nce_plain(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """-log of the positive's share, per query, from all logits: the definition.

    queries, positives: (M, D), L2-normalised, paired row by row; positives carry no gradient.
    negatives: (K, D), L2-normalised. Returns (M,).
    Source: docs/method.md, "Losses"; MoCo (arXiv 1911.05722), equation 1.
    """
    positive = (queries * positives).sum(1, keepdim=True)  # (M, 1)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature  # (M, 1 + K)
    return logits.logsumexp(1) - logits[:, 0]


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`info_nce_plain` without its logits: the same value and gradient, from one fused pass.

    dtype: of the products with the negatives, the queries' own by default. Sums, the positive's
    term and the result have the queries' precision, at least float32.
    Source: docs/method.md, "InfoNCE as attention".
    """
    dtype = dtype or queries.dtype
    lse = queue_logsumexp(queries.to(dtype), negatives.to(dtype), temperature)
    positive = (queries * positives).sum(1).to(lse.dtype) / temperature
    return F.softplus(lse - positive)  # log(e^positive + e^lse) - positive, stable if small


def queue_logsumexp(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """logsumexp over keys of queries @ keys.T / temperature, differentiable in the queries.

    queries: (M, D). keys: (K, D), taken as constants. Returns (M,), float32 (float64 for float64).
    """
    lse: Tensor = _queue_attention(queries, keys, 1 / temperature)[1]
    return lse


@torch.library.custom_op("dupr::queue_attention", mutates_args=())
def _queue_attention(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the keys (M, D), and logsumexp (M,), for each query.

    It is an operator of its own, so that torch.compile does not break it up.
    """
    return _kernel(queries.device.type, queries.dtype, queries.shape[1])(queries, keys, scale)


@_queue_attention.register_fake
def _(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(len(queries), dtype=_sums(queries.dtype))


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    ctx.scale = inputs[2]
    ctx.save_for_backward(output[0])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, _mean: Tensor | None, lse: Tensor | None
) -> tuple[Tensor | None, None, None]:
    # Only the logsumexp is used, and its gradient is the mean key; the mean itself has no gradient.
    if lse is None:
        return None, None, None
    (mean,) = ctx.saved_tensors
    return (lse[:, None] * ctx.scale * mean).to(mean.dtype), None, None


_queue_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _sums(dtype: torch.dtype) -> torch.dtype:
    """The precision in which logits of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)


def streamed_attention(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> tuple[Tensor, Tensor]:
    """Attention over a queue in blocks of keys with a running maximum, on any device and precision.

    linear: maps x (M, A), y (B, A) to x @ y.T (M, B).
    Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867).
    """
    sums = _sums(queries.dtype)
    scaled = queries * scale
    largest = queries.new_full((len(queries), 1), -torch.inf, dtype=sums)
    total = torch.zeros_like(largest)
    weighted = queries.new_zeros(queries.shape, dtype=sums)
    for block in torch.split(keys, _BLOCK):
        logits = linear(scaled, block).to(sums)
        higher = torch.maximum(largest, logits.amax(1, keepdim=True))
        logits = logits.sub_(higher).exp_()
        shrink = (largest - higher).exp_()
        total = total.mul_(shrink).add_(logits.sum(1, keepdim=True))
        weighted.mul_(shrink).add_(linear(logits.to(block.dtype), block.T).to(sums))
        largest = higher
    return (weighted / total).to(queries.dtype), (largest + total.log()).squeeze(1)


def _cpu_onednn(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # oneDNN uses the vector units of any CPU; MKL, behind F.linear, uses only Intel's.
    return streamed_attention(
        queries,
        keys,
        scale,
        lambda x, y: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""),
    )


def _cpu_flash(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # The kernel splits a head into blocks of queries; two heads give two cores equal work.
    heads = 2 if len(queries) % 2 == 0 else 1
    q = queries.view(1, heads, -1, queries.shape[1])
    k = keys[None, None].expand(1, heads, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    return out.reshape(queries.shape), lse.reshape(-1)


def _cuda_flash(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k = queries[None, None], keys[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[:2]
    return out[0, 0].contiguous(), lse[0, 0, : len(queries)].clone()


def _cuda_efficient(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k = queries[None, None], keys[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, k, None, True, scale=scale
    )[:2]
    # The kernel pads the sums to a multiple of 32 queries.
    return out[0, 0].contiguous(), lse[0, 0, : len(queries)].clone()


# Fused kernels worth trying, best first. If none works, the streamed form is used.
_CANDIDATES: dict[tuple[str, torch.dtype], list[Kernel]] = {
    ("cpu", torch.float32): [_cpu_onednn, _cpu_flash],
    ("cuda", torch.float32): [_cuda_efficient],
    ("cuda", torch.float16): [_cuda_flash, _cuda_efficient],
    ("cuda", torch.bfloat16): [_cuda_flash, _cuda_efficient],
}
_chosen: dict[tuple[str, torch.dtype, int], Kernel] = {}


def _kernel(device: str, dtype: torch.dtype, dim: int) -> Kernel:
    """The fastest kernel that this torch has and that computes correctly here.

    They are torch's own, but not part of its stable interface: each is tried on a small queue
    against float64 before it is used. docs/benchmarks.md holds the timings behind their order.
    """
    key = (device, dtype, dim)
    if key not in _chosen:
        candidates = _CANDIDATES.get(key[:2], [])
        _chosen[key] = next((k for k in candidates if _is_right(k, *key)), streamed_attention)
    return _chosen[key]


def _is_right(kernel: Kernel, device: str, dtype: torch.dtype, dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(70 + 321, dim, generator=generator)
    rows = F.normalize(rows, dim=1).to(device, dtype)
    queries, keys = rows[:70], rows[70:]
    try:
        results = kernel(queries, keys, 5.0)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return False  # not built for this device, this size, or under another name
    wanted = streamed_attention(queries.double(), keys.double(), 5.0)
    return all(
        bool((a.double() - b).abs().max() <= _TOLERANCE[dtype])
        for a, b in zip(results, wanted, strict=True)
    )


def masked_mean(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Mean over the entries of `values` (N, ...) whose row is in `mask` (N,) bool; 0 if empty.

    count: rows to divide by instead of those in the mask, when `values` is a part of a batch.
    """
    mask = mask.to(values.dtype)
    per_row = values.flatten(1).mean(1)
    return (per_row * mask).sum() / (mask.sum().clamp(min=1) if count is None else count)
