"""The images that a run is trained on, remembered by their names, so that changed data are noticed on resuming."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.runs.folder import RunFolder


def summary(names: Sequence[str] | None, count: int) -> dict[str, Any]:
    """Returns what the history holds of a data set: the number of images, and a digest of their names, if known."""
    if names is None:
        return {"images": count}
    return {"images": count, "names": hashlib.blake2b(_lines(names), digest_size=16).hexdigest()}


def write_names(folder: RunFolder, names: Sequence[str] | None) -> None:
    """Writes the names into the run folder."""
    if names is not None:
        with replacing(folder.names) as partial:
            partial.write_bytes(gzip.compress(_lines(names), 6, mtime=0))


def check_same(folder: RunFolder, before: Mapping[str, Any], names: Sequence[str] | None, count: int) -> None:
    """Checks that the data are those that the run was trained on before.

    Args:
        folder: of the run.
        before: what its history holds of the data set; empty in runs of earlier versions.
        names: of the images now; None if they have none.
        count: their number.

    Raises:
        UserError: if they differ; it says what is missing and what was added.
    """
    now = summary(names, count)
    known = {name: value for name, value in before.items() if name in now}
    if all(now[name] == value for name, value in known.items()):
        return
    remedy = "put them back, or go on with --accept-changed-data"
    if names is None or not folder.names.is_file():
        raise UserError(f"the run was trained on {known['images']:,} images, and the data hold {count:,} now; {remedy}")
    old = dict.fromkeys(gzip.decompress(folder.names.read_bytes()).decode("utf-8", "surrogateescape").split("\n"))
    new = dict.fromkeys(_lines(names).decode("utf-8", "surrogateescape").split("\n"))
    missing, added = ([name for name in some if name not in others] for some, others in ((old, new), (new, old)))
    told = []
    if missing:
        told.append(f"{counted(len(missing), 'image')} missing, such as {missing[0]}")
    if added:
        told.append(f"{len(added):,} new, such as {added[0]}")
    raise UserError(f"the data have changed since the run began: {'; '.join(told) or 'another order'}; {remedy}")


def _lines(names: Sequence[str]) -> bytes:
    return os.fsencode("\n".join(name.replace("\n", "\\n") for name in names))
