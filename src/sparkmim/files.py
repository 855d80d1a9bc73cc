"""Files that are either whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkmim.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `path` at the end, or is deleted on an error.

    Raises:
        ValueError: if there can be no such file.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made a folder ({error.strerror}); choose another out") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_file(path: str | Path, overwrite: bool) -> Path:
    """The path of a file that is going to be written; asked before any work is done for it.

    Raises:
        ValueError: if it is a folder, or taken.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; --out names a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    return path
