"""What this machine has: cores, memory, and the rate of its matrix products."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dupr_cli.errors import UsageError

if TYPE_CHECKING:  # dupr prepare asks for cores and memory, and needs no torch
    import torch

# Long enough to leave the noise of a single product, short enough for a dry run.
_SECONDS = 0.1
# A side at which a product is bound by arithmetic and not by memory.
_SIDE = {"cpu": 1024, "cuda": 8192}
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory that this machine, or the container around this process, has."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


def peak_memory_bytes(of_children: bool = False) -> int:
    """The most main memory that this process, or the largest of its ended children, has held."""
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    # In KiB, but on macOS in bytes.
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def require_room(processes: int, each: int, what: str) -> None:
    """Raises UsageError when worker processes need more memory than there is.

    each: bytes that one takes. what: the option or recipe key that asks for so many.
    """
    wanted, there = processes * each / 2**30, memory_bytes() / 2**30
    if wanted > there:
        raise UsageError(
            f"{what}: {processes} worker processes would need about {wanted:.0f} GiB of memory, "
            f"and there are {there:.0f}. Use fewer; more than one per core ({cores()} here) seldom "
            f"helps."
        )


def device_memory_bytes(device: torch.device) -> int:
    """Memory of a device; of the CPU, the main memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()


def device_name(device: torch.device) -> str:
    """The device in words, for a table."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} on {cores()} cores"


def matrix_rate(device: torch.device, precision: torch.dtype) -> float:
    """Operations per second of large square matrix products, measured in a tenth of a second."""
    import torch

    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    a @ b
    products, start = 0, now()
    while (elapsed := now() - start) < _SECONDS or not products:
        a @ b
        products += 1
    return products * 2 * side**3 / elapsed
