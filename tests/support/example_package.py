"""The backbone of tests/example_backbone, installed as another package would be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "example_backbone"


def install(target: Path) -> Path:
    """Install the package into a folder of its own, which then belongs on sys.path."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(EXAMPLE)], check=True)
    return target
