"""The images that a run is trained on, remembered by their names, so that changed data are noticed on resuming."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.runs.folder import RunFolder


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training set.

    Attributes:
        count: their number.
        names: one per line; None if they have none.
    """

    count: int
    names: bytes | None

    @classmethod
    def of(cls, count: int, names: Sequence[str] | None) -> TrainingImages:
        lines = None if names is None else "\n".join(name.replace("\n", "\\n") for name in names)
        return cls(count, None if lines is None else os.fsencode(lines))

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """What the history holds of them: their number, and a digest of their names."""
        if self.names is None:
            return {"images": self.count}
        return {"images": self.count, "names": hashlib.blake2b(self.names, digest_size=16).hexdigest()}

    def write(self, folder: RunFolder) -> None:
        """Writes the names into the run folder."""
        if self.names is not None:
            with replacing(folder.names) as partial:
                partial.write_bytes(gzip.compress(self.names, 6, mtime=0))

    def check_unchanged(self, folder: RunFolder, before: Mapping[str, Any]) -> None:
        """Checks that a run was trained on the same before.

        Args:
            folder: of the run.
            before: the summary in its history; empty in runs of earlier versions.

        Raises:
            UserError: if they differ; it says what is missing and what was added.
        """
        if all(before.get(name, value) == value for name, value in self.summary.items()):
            return
        remedy = "put them back, or go on with --accept-changed-data"
        if self.names is None or not folder.names.is_file():
            raise UserError(
                f"the run was trained on {before['images']:,} images, and the data hold {self.count:,} now; {remedy}"
            )
        old, new = (
            dict.fromkeys(os.fsdecode(lines).split("\n"))
            for lines in (gzip.decompress(folder.names.read_bytes()), self.names)
        )
        missing, added = ([name for name in some if name not in others] for some, others in ((old, new), (new, old)))
        told = []
        if missing:
            told.append(f"{counted(len(missing), 'image')} missing, such as {missing[0]}")
        if added:
            told.append(f"{len(added):,} new, such as {added[0]}")
        raise UserError(f"the data have changed since the run began: {'; '.join(told) or 'another order'}; {remedy}")
