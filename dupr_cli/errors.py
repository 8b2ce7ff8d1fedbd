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


class InterruptedRunError(DuprError):
    """A run that was stopped by a signal, at a point from which it can be continued."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
