"""Errors for the user: one message, no traceback, a documented exit code.

Every deliberate error derives from `DuprError`. Its message says what is wrong, where (file, line,
key, shard, sample) and what to do; the command line prints it unchanged.
"""


class DuprError(Exception):
    """A failure with a message for the user. `exit_code`: of the process."""

    exit_code = 1


class UsageError(DuprError):
    """Wrong usage, recipe or input; nothing was started."""

    exit_code = 2


class RunError(DuprError):
    """A run that began but could not continue."""


class StoppedRunError(DuprError):
    """A run that stopped before its end (by a signal, a limit of time or steps) and was saved.

    The same command continues it. The exit code is 75 (EX_TEMPFAIL of sysexits.h), on which a job
    script requeues, or 130 after Ctrl-C, as shells expect.
    """

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
