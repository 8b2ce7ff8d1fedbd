"""What processes take."""

from __future__ import annotations

from pathlib import Path


def resident(pid: int) -> float:
    """MiB of a process and its children."""
    total, processes = 0.0, [pid]
    while processes:
        process = processes.pop()
        try:
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) / 1024
            for task in Path(f"/proc/{process}/task").iterdir():
                processes += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total
