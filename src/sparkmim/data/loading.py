"""The stream of training batches, which starts wherever a run stands."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from sparkmim.data import UnreadableImage, collate
from sparkmim.data.samplers import StepBatchSampler

log = logging.getLogger("sparkmim")


_GRACE_SECONDS = 20


def leave_signals_to_the_parent(worker: int) -> None:
    """Lets loader workers outlive a request to stop, which terminals and schedulers send to all processes alike.

    A worker that died at once would take the last step along. One that is told to terminate stays for a while
    and then goes, so that nobody who waits for it waits for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


_FEW = 100
"""Up to so many images are read sooner than worker processes are started."""


class _Marked(Dataset[tuple[int, Any, str]]):
    """Places, items and, where there is no item, the reason."""

    def __init__(self, source: Any, places: Sequence[int]) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, Any, str]:
        place = self.places[number]
        try:
            return place, self.source[place], ""
        except UnreadableImage as error:
            return place, None, str(error)


def _single(samples: list[Any]) -> Any:
    return samples[0]


def one_by_one(source: Any, places: Sequence[int], workers: int) -> Iterator[tuple[int, Any]]:
    """Places and items of a data set for validation, in order; unreadable ones are logged and left out."""
    loader = DataLoader(
        _Marked(source, places), 1, num_workers=workers if len(places) > _FEW else 0, collate_fn=_single,
        worker_init_fn=leave_signals_to_the_parent,
    )  # fmt: skip
    for place, item, complaint in loader:
        if complaint:
            log.warning("unreadable validation image left out: %s", complaint)
        else:
            yield place, item


def make_loader(
    dataset: Dataset[Any],
    sampler: StepBatchSampler,
    workers: int,
    pin_memory: bool,
    collate_fn: Callable[[Any], dict[str, Any]] = collate,
) -> DataLoader[Any]:
    """A loader over the endless stream."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
