"""Counts unreadable images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkmim.errors import UnusableData


class SkipLog:
    """Counts the unreadable images of the training process, and stops it when there are too many.

    Args:
        max_fraction: share of samples that others may stand in for.
        epoch_size: samples that this process sees in an epoch, if known. The share is judged from 100 samples or one
            epoch on, whichever is less.
    """

    def __init__(self, max_fraction: float = 0.1, epoch_size: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.enough = 100 if epoch_size is None else min(100, epoch_size)
        self.seen = 0
        self.count = 0  # samples that others stood in for
        self._unique: dict[str, None] = {}

    @property
    def unique(self) -> list[str]:
        """Path and reason of each unreadable image, in order of appearance."""
        return list(self._unique)

    def add(self, batch: Mapping[str, Any]) -> list[str]:
        """Counts a batch made by `collate`. Returns path and reason of images not known as unreadable before."""
        self.seen += len(batch["image"])
        if not batch["unreadable"]:  # nearly always; the line below would wait for a device
            return []
        self.count += int((batch["skipped"] > 0).sum())
        new = [complaint for complaint in dict.fromkeys(batch["unreadable"]) if complaint not in self._unique]
        self._unique.update(dict.fromkeys(new))
        return new

    def check(self, seen: int | None = None) -> None:
        """Raises `UnusableData` if others stood in for more than `max_fraction` of the samples.

        `seen` is their number, if not all of them went through `add`.
        """
        seen = self.seen if seen is None else seen
        if seen >= self.enough and self.count > self.max_fraction * seen:
            raise UnusableData(
                f"{self.count / seen:.1%} of the images seen are unreadable ({self.count:,} of {seen:,}), more than "
                f"the {self.max_fraction:.1%} allowed. The first are {'; '.join(self.unique[:3])}"
            )
