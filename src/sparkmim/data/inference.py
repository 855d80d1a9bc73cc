"""Whole images as a network takes them: read in order, without anything random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparkmim.data.arrays import MissingPackage, WholeArray
from sparkmim.data.augmentation import eval_transform, normalisation
from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.loading import leave_signals_to_the_parent
from sparkmim.data.source import Source
from sparkmim.errors import UserError

CROP = 0.875
"""Share of the resized image that the centre crop shows, where a weight file names none: 224 of 256."""


@dataclass(frozen=True)
class Preparation:
    """How images become a network's input, without anything random.

    Attributes:
        image_size: per axis.
        channels: of an image.
        mean: of each channel, as the network was trained; None if that is not known.
        std: as mean.
        crop: share of the resized image that the centre crop shows; None to resize it whole, as arrays always are.
    """

    image_size: tuple[int, ...]
    channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    crop: float | None

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.image_size)

    def settled(self, source: Source) -> Preparation:
        """With mean and std, where they are unknown: ImageNet's for images, those of the source for arrays."""
        if self.mean is not None and self.std is not None:
            return self
        if source.arrays:
            found = source.statistics()
            return replace(self, mean=found.mean, std=found.std)
        mean, std = normalisation(self.channels)
        return replace(self, mean=mean, std=std)

    def transform(self, source: Source) -> Callable[[Any], Tensor]:
        """From what `source` reads to float32 `[C, *image_size]`, normalised as `settled` says."""
        known = self.settled(source)
        mean, std = known.mean, known.std
        assert mean is not None
        assert std is not None
        if source.arrays:
            return WholeArray(self.image_size, mean, std)
        height, width = self.image_size
        return eval_transform((height, width), mean, std, self.crop)


@dataclass
class Batch:
    """Some images in the order of their source.

    Attributes:
        images: those that could be read, `[b, C, *S]`; None if there is none.
        places: of these, in the source.
        names: of these: paths, or numbers of items.
        unreadable: place, name and reason of the others.
    """

    images: Tensor | None
    places: list[int]
    names: list[str]
    unreadable: list[tuple[int, str, str]]


class _Stills(Dataset[tuple[int, str, Tensor | str]]):
    """Place, name, and image or reason of every item."""

    def __init__(self, items: Any, read: Callable[[Any, str], Any], transform: Callable[[Any], Tensor]) -> None:
        self.items, self.read, self.transform = items, read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, str, Tensor | str]:
        name = f"item {place}"
        try:
            item = self.items[place]
            if isinstance(self.items, list) and isinstance(item, str):
                name = item
            return place, name, self.transform(self.read(item, name))
        except MissingPackage:
            raise
        except UnreadableImage as error:
            return place, name, error.reason
        except OSError as error:  # a dataset that opens files itself
            return place, name, str(error)


def _collate(samples: list[tuple[int, str, Tensor | str]]) -> Batch:
    read = [(place, name, found) for place, name, found in samples if isinstance(found, Tensor)]
    return Batch(
        torch.stack([image for *_, image in read]) if read else None,
        [place for place, *_ in read],
        [name for _, name, _ in read],
        [(place, name, found) for place, name, found in samples if isinstance(found, str)],
    )


def still_batches(
    source: Source, preparation: Preparation, batch_size: int, workers: int | None, device: torch.device, doing: str
) -> Iterator[Batch]:
    """Reads images in order, with the progress on stderr if that is a terminal.

    Args:
        source: what to read.
        preparation: what becomes of it.
        batch_size: items at a time; of which those that are unreadable are left out.
        workers: loader processes; None for a number that suits the machine.
        device: where the images go.
        doing: a word for the progress bar.

    Raises:
        ValueError: if `batch_size` or `workers` is out of range.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be above 0")
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 or above")
    if workers is None:
        workers = 2 if len(source.items) > batch_size else 0  # a single batch is read sooner than they are started
    loader = DataLoader(
        _Stills(source.items, source.read, preparation.transform(source)), batch_size, num_workers=workers,
        collate_fn=_collate, worker_init_fn=leave_signals_to_the_parent, pin_memory=device.type == "cuda",
    )  # fmt: skip
    console = Console(stderr=True)
    for batch in track(loader, doing, console=console, disable=not console.is_terminal, transient=True):
        if batch.images is not None:
            batch.images = batch.images.to(device)
        yield batch
