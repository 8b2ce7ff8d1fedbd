"""The errors that a user is meant to read: one message, no traceback, a documented exit code.

Everything raised on purpose derives from `DuprError`. A message says what is wrong, where (file,
line, key, shard, sample) and what to do about it; the command line prints it as it is.
"""


class DuprError(Exception):
    """A failure with a message for the user. `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(DuprError):
    """Wrong usage, a wrong recipe or a wrong input: nothing was started."""

    exit_code = 2


class RunError(DuprError):
    """A run that began and could not go on."""


class StoppedRunError(DuprError):
    """A run that was told to stop before its end (a signal, a limit of time or steps) and saved.

    The same command goes on. Exit code 75 (EX_TEMPFAIL of sysexits.h), on which a job script
    requeues; 130 after Ctrl-C, as shells expect.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
