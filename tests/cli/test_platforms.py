"""Where dupr runs: without fork, as on macOS, and not on Windows, which it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipes import SMALL_NETWORK, TINY

FEW_MINUTES = 240
WITHOUT_FORK = """
import multiprocessing
from dupr_cli.__main__ import main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
"""


def test_windows_is_refused_by_name() -> None:
    program = "import sys; sys.platform = 'win32'; from dupr_cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: dupr does not run on Windows itself. Install it in WSL 2.\n")


@pytest.mark.slow
def test_workers_need_no_fork(tmp_path: Path, tiny_shards: Path) -> None:
    program = tmp_path / "spawn.py"
    program.write_text(WITHOUT_FORK)
    settings = [word for override in (*TINY, SMALL_NETWORK) for word in ("--set", override)]
    done = subprocess.run(
        [
            sys.executable, str(program), "pretrain", "dupr-r18-cpu-smoke", "--data",
            str(tiny_shards), "--out", str(tmp_path / "run"), *settings, "--workers", "2",
        ],
        capture_output=True, text=True, timeout=FEW_MINUTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
