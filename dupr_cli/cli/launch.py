"""Starts a command in several processes with torch.distributed.run's own launcher.

The launcher watches the processes, forwards signals, and ends all processes when one fails. A
process passes its final error message through a file to the launcher, which prints it once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dupr_cli.errors import RunError, StoppedRunError

# Set for the processes that `launch` starts, and read by `report_error` in them.
_LAUNCHED = "DUPR_LAUNCHED"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Longer than a step and a checkpoint of the largest runs take.
_GRACE_SECONDS = 600


class LaunchedError(RunError):
    """A process of a run failed; carries its own message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(nproc: int, nnodes: int, rendezvous: str, arguments: Sequence[str]) -> None:
    """Run `python -m dupr_cli ARGUMENTS` in nproc processes on this machine, and wait for them.

    Raises LaunchedError of the first process that failed, StoppedRunError after a signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nnodes > 1 and not rendezvous:
        raise RunError("--nnodes needs --rendezvous HOST:PORT, the same on every machine.")
    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE_SECONDS))
    logging.disable(logging.CRITICAL)  # the launcher's reports of failed processes repeat ours
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc,
        run_id="dupr",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dupr_cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        message = failure.message
        if failure.error_file_data is None or code > 128:
            message = (
                f"a process of the run ended with exit code {code} and without a message of dupr; "
                f"what it printed itself is above."
            )
        raise LaunchedError(message, code) from None
    except SignalException as error:
        code = 130 if error.sigval == signal.SIGINT else 75
        raise StoppedRunError(
            f"stopped by {signal.Signals(error.sigval).name}, after the processes had time to "
            f"save. The same command continues the run.",
            code,
        ) from None


def end_with_launcher() -> None:
    """Let the kernel end this process when the launcher that started it has ended.

    A killed launcher cannot end its processes, which would keep writing to the output of the next
    call of the same command.
    """
    if os.environ.get(_LAUNCHED) and sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def report_error(message: str) -> None:
    """Print an error message, or pass it to the launcher that started this process."""
    from dupr_cli.cli.console import print_error

    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not (file and os.environ.get(_LAUNCHED)):
        print_error(message)
        return
    # Here, because every command imports this module, and `--help` has no use for it.
    import json

    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
