"""The account of images that could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkmim.errors import UnusableData


class SkipLog:
    """The account of unreadable images, in the process that trains.

    Args:
        max_fraction: the share of samples that may be replaced by others.
        epoch_size: samples that this process sees in an epoch, if known. No share is judged on fewer than 100
            samples, or than one epoch.

    Attributes:
        seen: samples so far.
        count: those among them that were replaced.
        unique: what was unreadable, each once, in the order it came up: path and reason.
    """

    def __init__(self, max_fraction: float = 0.1, epoch_size: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.enough = 100 if epoch_size is None else min(100, epoch_size)
        self.seen = 0
        self.count = 0
        self._unique: dict[str, None] = {}

    @property
    def unique(self) -> list[str]:
        return list(self._unique)

    def add(self, batch: Mapping[str, Any]) -> list[str]:
        """Takes a batch into account, as `collate` makes it. Returns what had not been known as unreadable before."""
        self.seen += len(batch["image"])
        if not batch["unreadable"]:  # nearly always, and it keeps a device from waiting for the line below
            return []
        self.count += int((batch["skipped"] > 0).sum())
        new = [complaint for complaint in dict.fromkeys(batch["unreadable"]) if complaint not in self._unique]
        self._unique.update(dict.fromkeys(new))
        return new

    def check(self, seen: int | None = None) -> None:
        """Raises if too much is unreadable.

        Args:
            seen: samples so far, if not all of them went through `add`.

        Raises:
            RuntimeError: if more than `max_fraction` of them were replaced.
        """
        seen = self.seen if seen is None else seen
        if seen >= self.enough and self.count > self.max_fraction * seen:
            raise UnusableData(
                f"{self.count / seen:.1%} of the images seen are unreadable ({self.count:,} of {seen:,}), more than "
                f"the {self.max_fraction:.1%} allowed. The first are {'; '.join(self.unique[:3])}"
            )
