"""Errors that the command line tells in one line: input to mend, and runs that went wrong."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Bad input, told in one line: which file, which row, what is wrong.

    The command line prints it without a traceback and exits with 2.

    Args:
        reason: what was expected and what came.
        file: the file or folder at fault, if there is one.
        row: the 1-based row (line, conversation) in that file.
    """

    def __init__(
        self, reason: str, *, file: str | os.PathLike[str] | None = None, row: int | None = None
    ) -> None:
        self.reason = reason
        self.file = None if file is None else os.fspath(file)
        self.row = row
        where = [] if self.file is None else [self.file]
        if row is not None:
            where.append(f"row {row}")
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)


class RunError(RuntimeError):
    """A run cannot go on, or its results cannot be trusted, though its input was good.

    The command line prints it without a traceback and exits with 1.
    """
