"""The stream of training batches, which starts wherever a run stands."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from sparkmim.data import EpochBatchSampler, UnreadableImage, collate

log = logging.getLogger("sparkmim")


class StepBatchSampler(Sampler[list[tuple[int, ...]]]):
    """The batches of all epochs from the current step on, without an end.

    Args:
        samples: images in the data set.
        batch_size: images per optimiser step, over all processes.
        parts: batches that a step is split into on each process.
        rank: of this process.
        world_size: number of processes.
        seed: of the order.
        position: tells the optimiser step to start at, asked when iteration starts.
        repeats: as for `EpochBatchSampler`.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        parts: int,
        rank: int,
        world_size: int,
        seed: int,
        position: Callable[[], int],
        repeats: int = 1,
    ) -> None:
        self.samples = samples
        self.local_batch = batch_size // (parts * world_size)
        self.parts = parts
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.position = position
        self.repeats = repeats
        self.steps_per_epoch = samples // batch_size

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, step = divmod(self.position(), self.steps_per_epoch)
        while True:
            batches = EpochBatchSampler(
                self.samples, self.local_batch, rank=self.rank, world_size=self.world_size, seed=self.seed,
                epoch=epoch, start_step=step * self.parts, repeats=self.repeats,
            )  # fmt: skip
            for _, batch in zip(range((self.steps_per_epoch - step) * self.parts), batches, strict=False):
                yield batch
            epoch, step = epoch + 1, 0


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
