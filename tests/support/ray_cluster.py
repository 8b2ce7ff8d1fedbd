"""A small Ray cluster for one test at a time: `address="auto"` finds any cluster of the machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


@contextmanager
def only_ray_test() -> Iterator[None]:
    """Wait until no other test, in any process, is inside; skips where Ray is not installed."""
    pytest.importorskip("ray")
    with FileLock(Path(tempfile.gettempdir()) / "dupr-tests-ray.lock"):
        yield


@contextmanager
def small_cluster() -> Iterator[None]:
    """A cluster of two cores on this machine; use it inside `only_ray_test`."""
    ray: Any = import_module("ray")

    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
