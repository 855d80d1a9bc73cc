"""What `data` stands for: image files, array files, or a dataset, and how an item of it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparkmim.data import ChannelStatistics, channel_statistics, to_array, to_image
from sparkmim.data.arrays import ARRAY_SUFFIXES, MissingPackage
from sparkmim.data.augmentation import normalisation
from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.discovery import SUFFIXES, find_items
from sparkmim.data.labelled import Labelled
from sparkmim.errors import MissingPath, UserError

_FIRST_LOOK = 200
"""Samples that mean and deviation are measured on when a run starts without them."""


@dataclass
class Source:
    """A data set and what it holds.

    Attributes:
        items: a sequence of paths, or a dataset.
        arrays: whether items are arrays in their own units, of any channels and axes, rather than 8-bit images.
        channels: of every item.
        rank: number of spatial axes.
    """

    items: Any
    arrays: bool
    channels: int
    rank: int

    def read(self, item: Any, name: str) -> Any:
        """An item as `[C, *S]`: an array in its units, or a uint8 tensor."""
        if self.arrays:
            return to_array(item, self.channels, self.rank, name)
        return to_image(item, self.channels, name)

    def statistics(self, samples: int = _FIRST_LOOK) -> ChannelStatistics:
        """Mean and deviation per channel; of images in 0..1."""
        scale = 1.0 if self.arrays else 255.0
        return channel_statistics(self.items, self.read, scale, samples, Console(stderr=True))

    def normalisation(
        self, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Returns what is given; else ImageNet's mean and deviation for images, or those measured for arrays."""
        if mean is not None and std is not None:
            return mean, std
        if self.arrays:
            found = self.statistics()
            return mean or found.mean, std or found.std
        usual = normalisation(self.channels)
        return mean or usual[0], std or usual[1]


def open_source(data: Any, channels: int, rank: int) -> Source:
    """Finds the items of a data set.

    Files are of the kind that `find_items` chooses. A Dataset holds arrays in the same cases as files must.

    Raises:
        ValueError: if there is nothing to read, or it cannot be read with these channels and axes.
        FileNotFoundError: if a path does not exist.
    """
    if data is None:
        raise UserError("no data given; --data names a folder of images or arrays, or a text file of paths")
    if not isinstance(data, str):
        return Source(data, rank != 2 or channels not in (1, 3), channels, rank)
    paths, arrays = find_items(data, channels, rank)
    source = Source(paths, arrays, channels, rank)
    if source.arrays:
        _look_at(paths[0], source)
    return source


def _look_at(path: str, source: Source) -> None:
    """Fails before the run begins if the first array is of another shape, or its format cannot be read here."""
    try:
        source.read(path, path)
    except MissingPackage:
        raise
    except UnreadableImage as error:
        if "is of shape" in error.reason:
            raise UserError(str(error)) from error


def measure(data: Any, channels: int, rank: int, samples: int) -> ChannelStatistics:
    """What `sparkmim.statistics` does."""
    if rank not in (1, 2, 3):
        raise UserError(f"axes is {rank}; signals have 1, images 2, volumes 3")
    if channels < 1 or samples < 1:
        raise UserError(f"channels is {channels} and samples {samples}; both must be above 0")
    return open_source(data, channels, rank).statistics(samples)


def images_source(images: Any, channels: int, rank: int) -> Source:
    """What `images` stands for: as for pretraining, a single file, or a list of these.

    Raises:
        ValueError: if there is nothing to read.
        FileNotFoundError: if a path does not exist.
    """
    if images is None:
        raise UserError("no images given; --images names a folder, an image, or a text file of paths")
    if isinstance(images, list) and images and all(isinstance(part, (str, Path)) for part in images):
        parts = [images_source(part, channels, rank) for part in images]
        if len({part.arrays for part in parts}) > 1:
            raise UserError("some of the images are image files and some are arrays; give one kind at a time")
        return Source([item for part in parts for item in part.items], parts[0].arrays, channels, rank)
    if not isinstance(images, (str, Path)):
        return open_source(images, channels, rank)
    path = Path(images).expanduser().absolute()
    if not path.exists():
        raise MissingPath(f"there is no folder, image or text file {path}")
    name = path.name.lower()
    if path.is_file() and name.endswith((*SUFFIXES, *ARRAY_SUFFIXES)):
        arrays = name.endswith(ARRAY_SUFFIXES)
        if not arrays and (rank != 2 or channels not in (1, 3)):
            raise UserError(f"{path} is an image file, but the network takes {channels} channels and {rank} axes")
        return Source([str(path)], arrays, channels, rank)
    return open_source(str(path), channels, rank)


def labelled_source(images: Labelled, channels: int, rank: int) -> Source:
    """How labelled items are read: as arrays where the network's channels or axes ask for it, or files are arrays."""
    first = images.items[0] if isinstance(images.items, list) else None
    of_arrays = isinstance(first, str) and first.lower().endswith(ARRAY_SUFFIXES)
    arrays = rank != 2 or channels not in (1, 3) or of_arrays
    return Source(images.items, arrays, channels, rank)
