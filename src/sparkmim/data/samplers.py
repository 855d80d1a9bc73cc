"""The order of samples, which depends on (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from sparkmim.errors import UserError


def counted_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits that depends on all of `parts`, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(eq=False)
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

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    epoch: int = 0
    start_step: int = 0
    repeats: int = 1

    def __post_init__(self) -> None:
        size, rank, world = self.batch_size, self.rank, self.world_size
        if size < 1 or world < 1 or not 0 <= rank < world:
            raise UserError(f"batch_size {size}, rank {rank} and world_size {world} do not go together")
        if self.num_samples < size * world:
            largest = self.num_samples // world
            processes = f" on each of {world} processes" if world > 1 else ""
            advice = f"use a batch size of at most {largest}{processes}" if largest else "use fewer processes"
            raise UserError(f"one step takes {size * world} images, but there are only {self.num_samples}; {advice}")
        if not 0 <= self.start_step <= len(self):
            raise UserError(f"start_step is {self.start_step}; an epoch has {len(self)} steps")

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


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[tuple[int, ...]]]):
    """The endless batches of all epochs, from the current step on.

    The other arguments are those of `EpochBatchSampler`.
    """

    samples: int
    batch_size: int  # per optimiser step, over all processes
    parts: int  # batches that a step is split into on each process
    rank: int
    world_size: int
    seed: int
    position: Callable[[], int]  # returns the optimiser step to start at, called when iteration starts
    repeats: int = 1

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        steps, size = self.samples // self.batch_size, self.batch_size // (self.parts * self.world_size)
        epoch, step = divmod(self.position(), steps)
        while True:
            batches = EpochBatchSampler(
                self.samples, size, self.rank, self.world_size, self.seed, epoch, step * self.parts, self.repeats
            )
            yield from itertools.islice(batches, (steps - step) * self.parts)
            epoch, step = epoch + 1, 0
