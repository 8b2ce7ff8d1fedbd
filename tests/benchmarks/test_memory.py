"""Memory of a run over 2,000 steps: the main process and its loader processes, sampled.

make bench prints it; docs/benchmarks.md says what was seen.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dupr_cli.artifacts.run import MetricsLog
from tests.support.images import write_shards
from tests.support.memory import resident
from tests.support.recipes import TINY

STEPS = 2000


def test_memory_does_not_grow_over_2000_steps() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shards, run = write_shards(root / "shards", 400), root / "run"
        command = [sys.executable, "-m", "dupr_cli", "pretrain", "dupr-r18-cpu-smoke", "--quiet"]
        command += ["--data", str(shards), "--out", str(run)]
        for override in (*TINY, f"train.steps={STEPS}", "data.workers=2", "train.log_every=50",
                         "train.probe_every=500", "train.checkpoint_every=500"):  # fmt: skip
            command += ["--set", override]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen: dict[int, float] = {}
        while process.poll() is None:
            lines = [line for line in MetricsLog(run).read() if "loss" in line]
            if lines:
                seen[int(lines[-1]["step"])] = resident(process.pid)
            time.sleep(0.3)
        assert process.returncode == 0
    early = [mib for step, mib in seen.items() if 250 <= step < 600]
    late = [mib for step, mib in seen.items() if STEPS - 350 <= step < STEPS]
    before, after = sum(early) / len(early), sum(late) / len(late)
    print(
        f"\nresident, all processes: {before:.0f} MiB at steps 250-600, {after:.0f} MiB at the end"
    )
    assert after < 1.03 * before
