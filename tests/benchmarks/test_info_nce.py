"""InfoNCE in its fused, streamed and plain forms: time and growth of peak memory, side by side.

Each form runs in a process of its own, because peak memory is a process's. make bench prints the
table; docs/benchmarks.md says what was seen, on what.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

PROGRAM = """
import json, resource, sys, time
import torch, torch.nn.functional as F
from dupr_cli.pretrain import losses
form, device, dtype, rows, keys = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
dtype = getattr(torch, dtype)
if form == "streamed":
    losses._kernel = lambda *_: losses.streamed_attention
def step(q, k, queue):
    q = q.detach().requires_grad_()
    if form == "cross":  # as MoCo's public code has it
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1).to(dtype) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=device))
    elif form == "plain":
        loss = losses.info_nce_plain(q.to(dtype), k.to(dtype), queue.to(dtype), 0.2).float()
    else:
        loss = losses.info_nce(q, k, queue, 0.2, dtype)
    loss.mean().backward()
    return q.grad
torch.manual_seed(0)
q, k, queue = (F.normalize(torch.randn(n, 128), dim=1).to(device) for n in (rows, rows, keys))
cuda = device == "cuda"
step(q[:64], k[:64], queue[:1000])
if cuda: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
peak = (lambda: torch.cuda.max_memory_allocated()) if cuda else (
    lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
before = torch.cuda.memory_allocated() if cuda else peak()
step(q, k, queue)
growth = peak() - before
times = []
for _ in range(5):
    if cuda: torch.cuda.synchronize()
    start = time.perf_counter()
    step(q, k, queue)
    if cuda: torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(times)[2], "bytes": growth}))
"""


def measure(form: str, device: str, dtype: str, rows: int, keys: int) -> dict[str, float]:
    arguments = [form, device, *map(json.dumps, (dtype, rows, keys))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def compare(device: str, dtype: str, rows: int, keys: int) -> None:
    print(f"\nInfoNCE, {rows} queries, {keys} keys of 128, {dtype} on {device}")
    forms = ("plain", "cross", "streamed", "fused")
    results = {form: measure(form, device, dtype, rows, keys) for form in forms}
    plain = results["plain"]
    for form, found in results.items():
        print(
            f"  {form:9}{found['seconds']:8.3f} s  {found['bytes'] / 2**20:8.0f} MiB  "
            f"x{plain['seconds'] / found['seconds']:.1f} faster, "
            f"{found['bytes'] / plain['bytes']:.3f} of the memory"
        )
    assert results["fused"]["bytes"] < plain["bytes"]


def test_info_nce_on_the_cpu() -> None:
    for dtype in ("float32", "bfloat16"):
        compare("cpu", dtype, 1568, 65_536)


def test_info_nce_on_a_gpu() -> None:
    if torch.cuda.is_available():
        for dtype in ("float32", "bfloat16"):
            compare("cuda", dtype, 50_176, 65_536)
    else:
        print("\nInfoNCE on a GPU: none here")
