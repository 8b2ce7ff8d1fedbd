"""The command line in a process of its own, forked from this one: torch is imported already.

Starting Python and importing torch costs seconds for each process. A forked process is as real:
it has its own id, group and signals, and can be killed. It can train because tests/conftest.py
starts autograd's engine without threads. Commands that start worker processes by a
server of their own (`dupr prepare`) or by a launcher are started afresh instead.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from dupr_cli.__main__ import main


class Forked:
    """A running command; the part of `subprocess.Popen` that tests use, output as text."""

    def __init__(
        self,
        command: Sequence[object] | Callable[[], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """command: `python -m dupr_cli` and what follows, as for a process that is started afresh,
        or a function to call. environment: variables that the process has beside this one's.
        """
        self._environment = environment or {}
        self._main = main
        if callable(command):
            self.args, self._main = [command.__module__], command
        else:
            self.args = [str(word) for word in command]
            assert self.args[:3] == [sys.executable, "-m", "dupr_cli"]
        self._folder = Path(tempfile.mkdtemp(prefix="dupr-forked-"))
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become_the_command()

    def _become_the_command(self) -> None:
        code = 1
        try:
            os.setsid()
            faulthandler.disable()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for descriptor, name in ((1, "out"), (2, "err")):
                opened = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(opened, descriptor)
            sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            sys.argv = ["dupr", *self.args[3:]]
            os.environ.update(self._environment, NO_COLOR="1")
            sys.path[:0] = filter(None, self._environment.get("PYTHONPATH", "").split(os.pathsep))
            self._main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; what was written on standard output and on standard error."""
        self.wait(timeout)
        out, err = (
            path.read_text() if (path := self._folder / name).exists() else ""
            for name in ("out", "err")
        )
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """SIGKILL for the command and all processes that it started."""
        with suppress(ProcessLookupError):  # it has finished
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def forked(
    command: Sequence[object] | Callable[[], None],
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command (see `Forked`) to its end, as `subprocess.run` does with captured text."""
    process = Forked(command, environment)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def drop_rights_of_root() -> None:
    """Let this process meet permissions as other users do: root without its capabilities.

    Raises OSError where there are none to drop.
    """
    if os.geteuid() == 0:
        header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
            raise OSError(ctypes.get_errno(), "capset")


def as_main(code: str) -> Callable[[], None]:
    """For `Forked`: code as `python -c` runs it, with none of the names of the test.

    Variables that a library reads when it is imported come too late; set its own constants instead.
    """

    def run() -> None:
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(module))

    return run


def ranks(command: Sequence[object] | Callable[[], None], count: int) -> list[Forked]:
    """A command (see `Forked`) in processes that form one run, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [Forked(command, common | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(count)]


def finished(processes: Sequence[Forked], timeout: float = 300) -> str:
    """Wait until all have ended, without a failure; what the first wrote on standard error."""
    said = [process.communicate(timeout)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    return said[0]


def members_of_group(group: int) -> list[int]:
    """Processes that belong to a process group and have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, pgrp = place.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(place.parent.name))
    return found
