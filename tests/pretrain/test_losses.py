"""InfoNCE: the fused form against the definition, the definition against torch and differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dupr_cli.pretrain import losses
from dupr_cli.pretrain.losses import (
    info_nce,
    info_nce_plain,
    masked_mean,
    queue_logsumexp,
    streamed_attention,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def value_and_gradient(
    form: Callable[..., Tensor], q: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    leaf = q.detach().clone().requires_grad_()
    loss = form(leaf, *rest)
    # Another weight for each query, as a masked mean gives.
    weights = torch.linspace(0.5, 1.5, len(loss), device=loss.device, dtype=loss.dtype)
    torch.autograd.backward(loss, weights)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@settings(max_examples=25)
@given(
    rows=st.integers(1, 9),
    keys=st.integers(1, 40),
    dim=st.integers(2, 16),
    temperature=st.floats(0.05, 1.0),
)
def test_plain_info_nce_is_cross_entropy_with_the_positive_first(
    rows: int, keys: int, dim: int, temperature: float
) -> None:
    q, k, queue = unit(rows, dim), unit(rows, dim, seed=1), unit(keys, dim, seed=2)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(rows, dtype=torch.long), reduction="none")
    assert torch.allclose(info_nce_plain(q, k, queue, temperature), expected, atol=1e-4)


def test_plain_info_nce_gradient_by_finite_differences() -> None:
    q, k, queue = (unit(n, 5, seed=n).double() for n in (3, 3, 7))
    k = k[:3]
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce_plain(x, k, queue, 0.2), q)


def test_fused_info_nce_gradient_by_finite_differences() -> None:
    q, k, queue = unit(3, 5).double(), unit(3, 5, seed=1).double(), unit(1500, 5, seed=2).double()
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, k, queue, 0.2), q)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["chosen", "streamed"])
@settings(max_examples=40)
@given(
    rows=st.integers(1, 300),
    keys=st.integers(1, 3000),
    dim=st.sampled_from([1, 3, 16, 24, 128, 130]),
    temperature=st.floats(0.05, 2.0),
    seed=st.integers(0, 9),
)
def test_fused_info_nce_equals_the_plain_form(
    device: str, kernel: str, rows: int, keys: int, dim: int, temperature: float, seed: int
) -> None:
    q, k = unit(rows, dim, seed=seed).to(device), unit(rows, dim, seed=seed + 1).to(device)
    queue = unit(keys, dim, seed=seed + 2).to(device)
    wide = [t.double() for t in (q, k, queue)]
    value, gradient = value_and_gradient(info_nce_plain, *wide, temperature)
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "streamed":
            patch.setattr(losses, "_kernel", lambda *_: streamed_attention)
        found, slope = value_and_gradient(info_nce, q, k, queue, temperature)
    # Beside the whole loss, an entry of it may be near 0 (a positive alone among few negatives).
    assert relative(found, value) < 1e-5
    # The gradient is a difference of unit vectors over the temperature, rounded at that scale.
    rounding = 1e-6 * max(1.0, 1 / temperature)
    assert relative(slope, gradient) < 1e-5 or float((slope - gradient).abs().max()) < rounding


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20)
@given(rows=st.integers(1, 200), keys=st.integers(8, 3000), seed=st.integers(0, 9))
def test_fused_info_nce_in_bfloat16(device: str, rows: int, keys: int, seed: int) -> None:
    q, k = unit(rows, 128, seed=seed).to(device), unit(rows, 128, seed=seed + 1).to(device)
    queue = unit(keys, 128, seed=seed + 2).to(device)
    value, gradient = value_and_gradient(info_nce_plain, q, k, queue, 0.2)
    found, slope = value_and_gradient(info_nce, q, k, queue, 0.2, torch.bfloat16)
    assert found.dtype == slope.dtype == torch.float32
    assert relative(found, value) < 2**-8  # bfloat16 has 8 bits
    assert relative(slope, gradient) < 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_info_nce_inside_torch_compile(dtype: torch.dtype) -> None:
    q, k, queue = unit(40, 16), unit(40, 16, seed=1), unit(500, 16, seed=2)

    def loss(x: Tensor) -> Tensor:
        return info_nce(x, k, queue, 0.2, dtype).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for form in (loss, compiled):
        leaf = q.clone().requires_grad_()
        torch.autograd.backward(form(leaf))
        assert leaf.grad is not None
        results.append(torch.cat([form(leaf).detach().view(1), leaf.grad.flatten()]))
    assert torch.allclose(results[0], results[1])


def test_torch_checks_the_operator() -> None:
    q, queue = unit(6, 16).requires_grad_(), unit(20, 16, seed=1)
    torch.library.opcheck(
        losses._queue_attention,
        (q, queue, 5.0),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_kernel_that_gives_wrong_numbers_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        mean, lse = streamed_attention(queries, keys, scale)
        return mean, lse + 0.1

    def missing(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise RuntimeError("not built")

    monkeypatch.setattr(losses, "_chosen", {})
    monkeypatch.setitem(losses._CANDIDATES, ("cpu", torch.float32), [missing, wrong])
    assert losses._kernel("cpu", torch.float32, 16) is streamed_attention


def test_small_temperatures_and_large_vectors_do_not_overflow() -> None:
    q, queue = 30 * unit(5, 8), 30 * unit(2000, 8, seed=1)
    expected = (q.double() @ queue.double().T / 0.01).logsumexp(1)
    for lse in (queue_logsumexp(q, queue, 0.01), streamed_attention(q, queue, 100.0)[1]):
        assert torch.allclose(lse.double(), expected, rtol=1e-5)


def test_masked_mean_leaves_out_rows_and_survives_none() -> None:
    values = torch.tensor([[1.0, 3.0], [100.0, 100.0]])
    assert masked_mean(values, torch.tensor([True, False])) == 2
    assert masked_mean(values, torch.tensor([False, False])) == 0
    assert masked_mean(values, torch.tensor([True, False]), count=4) == 0.5
