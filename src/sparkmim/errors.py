"""Errors that are told to users as one sentence."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Collection


class UserError(ValueError):
    """An argument, a file or a data set that cannot be used; the message names it and the remedy.

    Every error that a user can mend is one of these, whatever else it is. The command line prints the message without
    a traceback.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        # Loader workers pass an error on as text, behind their traceback.
        if isinstance(message, str) and message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message, *more)


class UnusableData(UserError, RuntimeError):
    """Data that prove unusable while a run reads them."""


class MissingPath(UserError, FileNotFoundError):
    """A path that does not exist."""


def line_in(files: Collection[str], error: BaseException) -> int | None:
    """Returns the line of a user's own files where an error arose; None if it was elsewhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return lines[-1] if lines else None


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors by which disks say that they are full."""


class Unwritable(UserError, OSError):
    """A path that cannot be written.

    Args:
        path: file or folder.
        cause: error of the file system.
        size: bytes to write, if known.
        after: what to do once it can be written; to write elsewhere, if empty.
    """

    def __init__(self, path: object, cause: OSError, size: int | None = None, after: str = "") -> None:
        self.path, self.cause, self.size = path, cause, size
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        full = cause.errno in FULL
        remedies = []
        if full:
            remedies.append("free space there" if size is None else f"free {shown_bytes(size)} there")
        elif after:
            remedies.append("make it writable")
        remedies.append(f"then {after}" if after else "or choose another place" if full else "choose another place")
        super().__init__(f"{path} cannot be written ({reason}); {', '.join(remedies)}")


def shown_bytes(count: int) -> str:
    """Returns a number of bytes in words, rounded up.

    >>> shown_bytes(53_344), shown_bytes(197_900_000)
    ('54 kB', '198 MB')
    """
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{-(-count // 1000**power)} {('bytes', 'kB', 'MB', 'GB')[power]}"
