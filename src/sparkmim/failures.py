"""What befalls a command from outside, in a sentence: full disks, loader workers and processes that are killed."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkmim.errors import FULL, Unwritable, UserError


class Killed(UserError, RuntimeError):
    """A loader worker or another process of a run that is gone, or memory that is not there."""


@contextmanager
def told(place: object = "a file", after: Callable[[], str] = str) -> Iterator[None]:
    """Raises errors of the file system, and of loader workers that are gone, as a `UserError` with the remedy.

    Args:
        place: where an error arose that names no file.
        after: returns what to do once things are mended, such as to continue with --resume; called on an error.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, Unwritable) and (then := after()):
            raise Unwritable(error.path, error.cause, error.size, then) from error
        raise
    except OSError as error:
        if _in_the_loader(error):
            then = after()
            raise Killed(f"{_KILLED}, then {then}" if then else _KILLED) from error
        raise _of_files(error, error.filename or place, after()) from error
    except (RuntimeError, MemoryError) as error:
        remedy = _of_memory(error) or _of_workers(error)
        if remedy is None:
            raise
        then = after()
        raise Killed(f"{remedy}, then {then}" if then else remedy) from error


_KILLED = "a loader worker was killed, as happens where memory runs out; use fewer --workers or a smaller batch"


def _in_the_loader(error: OSError) -> bool:
    """Whether the connection to a loader worker broke off: what the worker was sending when it was killed."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ConnectionError) and any("torch/utils/data" in frame.filename for frame in frames)


def _of_files(error: OSError, path: object, after: str) -> UserError:
    if not error.errno:  # a loader worker's, which arrives as text behind its traceback
        return UserError(str(error).strip().rpartition("\n")[2])
    if error.errno in (*FULL, errno.EROFS):
        return Unwritable(path, error, after=after)
    then = f", then {after}" if after else ""
    reason = os.strerror(error.errno)
    return UserError(f"{path} cannot be used ({reason}); see that it is there and yours{then}")


def _of_memory(error: BaseException) -> str | None:
    """Returns what to lower if memory was asked for that there is not; None if it was something else."""
    if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        return None
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    size = f" for {int(asked[1]) / 1e9:,.1f} GB" if asked else ""
    return f"there is not enough memory{size}; use a smaller --batch-size or --image-size"


def _of_workers(error: BaseException | None) -> str | None:
    """Returns what has happened to loader workers, and the remedy; None if it was something else."""
    said = ""
    while error is not None:
        said, error = f"{said} {error}", error.__cause__ or error.__context__
    if "shared memory" in said or "</torch_" in said:
        size = f" ({_shared_memory()})" if Path("/dev/shm").exists() else ""
        return f"shared memory is used up{size}; use --workers 0, or give a container more by --shm-size 8g"
    if "DataLoader worker" not in said or "Original Traceback" in said:
        return None
    if "signal: Killed" in said or "unexpectedly" in said:
        return _KILLED
    return f"a loader worker ended ({said.partition('signal: ')[2].partition('.')[0]}); use --workers 0"


def _shared_memory() -> str:
    found = os.statvfs("/dev/shm")
    return f"/dev/shm holds {found.f_blocks * found.f_frsize / 2**20:.0f} MB"
