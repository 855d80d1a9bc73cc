"""The order of samples, which depends on (seed, epoch) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from sparkmim.errors import UserError


def counted_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits that depends on all of `parts`, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochBatchSampler(Sampler[list[tuple[int, ...]]]):
    """The batches of one epoch for one process, as lists of `(epoch, index)`.

    The epoch's order is drawn from (seed, epoch). Each step takes the next `batch_size · world_size` samples, and each
    process its `batch_size` of them in turn, so the number of processes changes no step. Samples that do not fill a
    last step are left out, and appear in other epochs.

    With `repeats`, an image is repeated so many times in a row (repeated augmentation, Hoffer et al., CVPR 2020). An
    epoch keeps its length, and so shows fewer images; its batches hold `(epoch, index, repeat)`.

    Example:
        >>> sampler = EpochBatchSampler(num_samples=5, batch_size=2, epoch=3)
        >>> len(sampler), [epoch for batch in sampler for epoch, index in batch]
        (2, [3, 3, 3, 3])
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        start_step: int = 0,
        repeats: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch_size {batch_size}, rank {rank} and world_size {world_size} do not go together")
        if num_samples < batch_size * world_size:
            largest = num_samples // world_size
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            advice = f"use a batch size of at most {largest}{processes}" if largest else "use fewer processes"
            raise UserError(
                f"one step takes {batch_size * world_size} images, but there are only {num_samples}; {advice}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
        self.start_step = start_step
        self.repeats = repeats
        if not 0 <= start_step <= len(self):
            raise UserError(f"start_step is {start_step}; an epoch has {len(self)} steps")

    def __len__(self) -> int:
        """Number of steps of the whole epoch, wherever iteration starts."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        generator = torch.Generator().manual_seed(counted_seed(self.seed, self.epoch, "order"))
        order = torch.randperm(self.num_samples, generator=generator)
        for step in range(self.start_step, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.repeats == 1:
                yield [(self.epoch, int(order[place])) for place in places]
            else:
                yield [(self.epoch, int(order[place // self.repeats]), place % self.repeats) for place in places]


class StepBatchSampler(Sampler[list[tuple[int, ...]]]):
    """The endless batches of all epochs, from the current step on.

    Args:
        samples: number of images in the data set.
        batch_size: images per optimiser step, over all processes.
        parts: batches that a step is split into on each process.
        position: returns the optimiser step to start at, called when iteration starts.
        rank, world_size, seed, repeats: as for `EpochBatchSampler`.
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
