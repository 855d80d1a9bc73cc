"""Batches for inference: whole images in order, without anything random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparkmim.data.arrays import WholeArray
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.dataset import share_paths
from sparkmim.data.decoding import UnreadableImage, name_of
from sparkmim.data.loading import live_with_the_parent
from sparkmim.data.source import Source
from sparkmim.terminal import Terminal

CROP = 0.875
"""Share of the resized image that the centre crop shows, if weights do not say: 224 of 256."""


@dataclass(frozen=True)
class Preparation:
    """How images become a network's input, without anything random."""

    image_size: tuple[int, ...]
    channels: int
    mean: Sequence[float] | None  # per channel, as in training; None if that is not known
    std: Sequence[float] | None
    crop: float | None  # share that the centre crop shows; None to resize images whole, as arrays always are

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.image_size)

    def settled(self, source: Source) -> Preparation:
        """Fills unknown mean and std with those that `Source.normalisation` settles."""
        mean, std = source.normalisation(self.mean, self.std)
        return replace(self, mean=mean, std=std)

    def transform(self, source: Source) -> Callable[[Any], Tensor]:
        """Makes the transform from what `source` reads to float32 `[C, *image_size]`."""
        mean, std = source.normalisation(self.mean, self.std)
        if source.arrays:
            return WholeArray(self.image_size, mean, std)
        height, width = self.image_size
        return eval_transform((height, width), mean, std, self.crop)


@dataclass
class Batch:
    """Images in the order of their source."""

    images: Tensor | None  # readable ones [b, C, *S]; None if there is none
    places: list[int]  # of readable images in the source
    names: list[str]  # of readable images: their paths, or numbers of items
    unreadable: list[tuple[int, str, str]]  # place, name and reason


class _Stills(Dataset[tuple[int, str, Tensor | str]]):
    """Place, name, and image of every item; of an unreadable one, the reason in place of the image."""

    def __init__(self, items: Any, read: Callable[..., Any], transform: Callable[[Any], Tensor]) -> None:
        self.items, self.read, self.transform = share_paths(items), read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, str, Tensor | str]:
        name = f"item {place}"
        try:
            item = self.items[place]
            name = name_of(item, place)
            return place, name, self.transform(self.read(item, name=name))
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
    source: Source, preparation: Preparation, batch_size: int, workers: int | None, device: torch.device,
    doing: str | None,
) -> Iterator[Batch]:  # fmt: skip
    """Reads images in order, and shows progress on stderr if that is a terminal, unless `doing` is None.

    Batches are of `batch_size` items, of which unreadable ones are left out. If `workers` is None, there are 2, or none
    for a single batch.
    """
    if doing is not None:
        source.say_loss(preparation.image_size)
    if workers is None:
        workers = 2 if len(source.items) > batch_size else 0  # reading one batch beats starting workers
    loader = DataLoader(
        _Stills(source.items, source.read, preparation.transform(source)), batch_size, num_workers=workers,
        collate_fn=_collate, worker_init_fn=live_with_the_parent, pin_memory=device.type == "cuda",
    )  # fmt: skip
    console = Terminal()
    silent = doing is None or not console.is_terminal
    for batch in track(loader, doing or "", console=console, disable=silent, transient=True):
        if batch.images is not None:
            batch.images = batch.images.to(device)
        yield batch
