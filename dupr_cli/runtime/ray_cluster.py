"""A running Ray cluster, for commands with `--engine ray`. Ray itself is an optional package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dupr_cli.errors import RunError, UsageError


def require_ray() -> None:
    """Raises UsageError when Ray is not installed."""
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install 'dupr-cli[ray]'.")


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, connected to the cluster that this machine belongs to.

    A connection that was made here is closed at the end. Raises UsageError without a cluster, and
    RunError for what fails in it; an OSError of a task is raised as itself.
    """
    ray: Any = import_module("ray")
    begun_here = not ray.is_initialized()
    if begun_here:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise UsageError(
                "--engine ray: this machine belongs to no running Ray cluster. Start one with "
                "`ray start --head`, or set RAY_ADDRESS."
            ) from error
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        raise (cause if isinstance(cause, OSError) else RunError(str(error))) from error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the Ray cluster failed: {error}. Give the same command again to continue."
        ) from error
    finally:
        if begun_here:
            ray.shutdown()
