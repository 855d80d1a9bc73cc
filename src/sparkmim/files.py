"""Atomic file writes."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeGuard

from sparkmim.arguments import listed
from sparkmim.errors import FULL, Unwritable, UserError

_STALE_SECONDS = 24 * 3600
"""Age at which a temporary file is taken for one that a killed process left behind."""


@contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to; its file then replaces `path`, or is deleted on an error.

    Every whole file is written this way. Readers see the old content or the new one, and a process that has mapped the
    old file keeps it. The temporary file is in the same folder, which is created. Its name is unique, so processes that
    write the same file do not disturb each other, and keeps the suffix, from which writers tell the format.

    Args:
        size: bytes to write, if known.

    Raises:
        Unwritable: if the file cannot be written.

    Example:
        >>> with replacing(Path("metrics.json")) as partial:  # doctest: +SKIP
        ...     partial.write_text("{}")
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (*FULL, errno.EROFS):
            raise Unwritable(path, error, size) from error
        raise UserError(f"{path.parent} cannot be made a folder ({error.strerror}); choose another out") from error
    _delete_stale(path)
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if isinstance(error, UserError) or str(error.filename) not in ("None", str(partial)):
            raise  # about another file, which was read meanwhile
        raise Unwritable(path, error, size) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def opened_for_torch(path: Path) -> Iterator[Any]:
    """Yields a new file for `torch.save`, and raises the first error of writing once that is done.

    PyTorch's writer ends the process if an error interrupts it, and given a path, it hides the reason.
    """
    with path.open("wb") as file:
        writer = _Writer(file)
        yield writer
        if writer.error is not None:
            raise writer.error


class _Writer:
    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                return self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Does nothing; the file is flushed when it is closed."""


def are_paths(value: Any) -> TypeGuard[Sequence[str | Path]]:
    """Tells whether a value is a list of paths, with at least one."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str | Path) for item in value)


def _delete_stale(path: Path) -> None:
    for left in path.parent.glob(f"{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def new_file(path: str | Path, overwrite: bool, endings: Sequence[str] = ()) -> Path:
    """Returns the path of a file to write, checked before any work is done for it.

    Args:
        endings: of its name, in lower case; empty for any.

    Raises:
        UserError: if it is a folder, has another ending, exists and must not be replaced, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; --out names a file")
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"out is {path}; its name ends in {listed(endings, 'or')}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    check_parents(path)
    return path


def new_folder(path: str | Path, overwrite: bool | None = None) -> None:
    """Checks a folder to write into; `overwrite` is None where nothing may be replaced.

    Raises:
        UserError: if it is a file, is not empty, or cannot be made.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; --out names a folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        replace = "" if overwrite is None else ", or replace what is there with --overwrite"
        raise UserError(f"{path} is not empty; choose another --out{replace}")
    check_parents(path)


def check_parents(path: Path) -> None:
    """Raises a `UserError` if the folder of a path is not there and cannot be made, or cannot be written."""
    parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise UserError(f"{parent} cannot be made a folder, for it is a file; choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EROFS if os.statvfs(parent).f_flag & os.ST_RDONLY else errno.EACCES)
        raise UserError(f"{parent} cannot be written ({reason}); choose another --out")
