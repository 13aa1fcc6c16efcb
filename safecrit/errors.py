"""The errors a user can meet. The command line turns them into one message and an exit code.

A message says what is wrong, where, and what to do next. Anything else that
escapes a command is a bug of ours and shows a traceback.
"""

from __future__ import annotations


class SafecritError(Exception):
    """Something the user can mend: a wrong file, model, column or option. Exit code 1."""

    exit_code = 1


class UsageError(SafecritError):
    """Options that are missing or exclude one another. Exit code 2, as for any wrong usage."""

    exit_code = 2


class CheckFailed(SafecritError):
    """The command ran, but a check or threshold it was asked for did not hold. Exit code 3."""

    exit_code = 3


class NothingToDo(SafecritError):
    """What was asked for is done already. Exit code 0: a script that restarts what was interrupted ends well."""

    exit_code = 0


class FormatError(SafecritError, ValueError):
    """A file that is not what its format promises; names the file and the first fault found."""


class MismatchError(SafecritError, ValueError):
    """Two things that do not belong together: a mask and a model, a delta and a base."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a device or on the host (where it raises a plain RuntimeError)."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
