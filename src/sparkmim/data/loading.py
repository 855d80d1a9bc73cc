"""Loaders of training and validation samples, and their worker processes."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from sparkmim.data.dataset import AugmentedDataset, collate, unchanged
from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.samplers import StepBatchSampler

log = logging.getLogger("sparkmim")

_GRACE_SECONDS = 20

_FEW = 100
"""Up to this many images, reading in-process beats starting workers."""


def live_with_the_parent(worker: int) -> None:
    """Makes a loader worker outlive a request to stop, which terminals and schedulers send to all processes alike.

    A worker that died at once would fail the last step. After SIGTERM it lives on for `_GRACE_SECONDS`, so that
    nobody waits for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_later)
    die_with_the_parent()


def die_with_the_parent() -> None:
    """Makes this process, on Linux, end when the one that started it does, whatever library it is busy in."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it died before it was asked about
            os._exit(1)


def _exit_later(number: int, frame: object) -> None:
    timer = threading.Timer(_GRACE_SECONDS, os._exit, [128 + number])  # Windows has no signal.alarm
    timer.daemon = True
    timer.start()


class _Marked(Dataset[tuple[int, Any, str]]):
    """Places and items of a data set; in place of an unreadable item, None and the reason."""

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


def log_unreadable(complaint: str) -> None:
    """Logs a validation image that cannot be read."""
    log.warning("unreadable validation image left out: %s", complaint)


def one_by_one(
    source: Any, places: Sequence[int], workers: int, complain: Callable[[str], None] = log_unreadable
) -> Iterator[tuple[int, Any]]:
    """Yields places and items of a validation set in order; leaves out unreadable ones, after a complaint."""
    loader = DataLoader(
        _Marked(source, places), None, num_workers=workers if len(places) > _FEW else 0, collate_fn=unchanged,
        worker_init_fn=live_with_the_parent,
    )  # fmt: skip
    for place, item, complaint in loader:
        if complaint:
            complain(complaint)
        else:
            yield place, item


def in_order(
    dataset: AugmentedDataset, places: Sequence[int], batch_size: int, workers: int
) -> DataLoader[dict[str, Any]]:
    """Makes the loader of some samples of a data set, as epoch 0 gives them, in this order."""
    keys = [[(0, place) for place in places[first : first + batch_size]] for first in range(0, len(places), batch_size)]
    return DataLoader(
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers, worker_init_fn=live_with_the_parent
    )


def make_loader(
    dataset: Dataset[Any],
    sampler: StepBatchSampler,
    workers: int,
    pin_memory: bool,
    collate_fn: Callable[[Any], dict[str, Any]] = collate,
) -> DataLoader[Any]:
    """Makes the loader of the endless stream of training batches."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        worker_init_fn=live_with_the_parent,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
