"""What `data` stands for: image files, array files, or a dataset, and how its items are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkmim.data.arrays import ARRAY_SUFFIXES, to_array
from sparkmim.data.augmentation import normalisation
from sparkmim.data.decoding import UnreadableImage, to_image
from sparkmim.data.discovery import SUFFIXES, find_images
from sparkmim.data.problems import counted
from sparkmim.data.statistics import ChannelStatistics, channel_statistics
from sparkmim.errors import MissingPath, UserError
from sparkmim.terminal import Terminal

_FIRST_LOOK = 200
"""Samples to measure mean and deviation on when a run starts without them."""


@dataclass(frozen=True)
class Source:
    """A data set, and how its items are read. `Source.of` decides whether they are images or arrays."""

    items: Any  # a sequence of paths, or a dataset
    arrays: bool  # whether items are arrays in their own units, of any channels and axes, rather than 8-bit images
    channels: int
    rank: int  # number of spatial axes

    @classmethod
    def of(cls, items: Any, channels: int, rank: int, name: object = "the data set") -> Source:
        """Decides whether items are images or arrays.

        Image files hold 1 or 3 channels and two axes: anything else is read as arrays, and so are paths without an
        image file among them.
        """
        arrays = rank != 2 or channels not in (1, 3)
        if isinstance(items, (list, tuple)) and items and all(isinstance(item, (str, Path)) for item in items):
            if not arrays:
                arrays = all(map(is_array, items))
            elif not any(map(is_array, items)):
                kind = counted(channels, "channel") if rank == 2 else {1: "signals", 3: "volumes"}[rank]
                raise UserError(
                    f"{name} holds image files only, which have 1 or 3 channels and two axes; {kind} are read from "
                    f"{', '.join(ARRAY_SUFFIXES)} files"
                )
        return cls(items, arrays, channels, rank)

    @classmethod
    def of_files(cls, data: str | Path, channels: int, rank: int) -> Source:
        """Finds the files of a folder or a text file, as `find_images` does; of images and arrays, one kind."""
        paths = find_images(data, suffixes=(*SUFFIXES, *ARRAY_SUFFIXES))
        found = cls.of(paths, channels, rank, data)
        return cls([path for path in paths if is_array(path) == found.arrays], found.arrays, channels, rank)

    def check_shape(self) -> Source:
        """Returns the same source, if its first array has the shape wanted: else a run would fail after its start.

        Raises:
            UserError: if the first array has another shape, or a package is missing to read it.
        """
        if self.arrays and isinstance(item := self.items[0], (str, Path)):
            try:
                self.read(item)
            except UnreadableImage as error:
                if "is of shape" in error.reason:
                    raise UserError(str(error)) from error
        return self

    @property
    def read(self) -> Callable[..., Any]:
        """Reads an item as `[C, *S]`, an array in its units or a uint8 tensor; called as `read(item, name=...)`."""
        if self.arrays:
            return functools.partial(to_array, channels=self.channels, rank=self.rank)
        return functools.partial(to_image, channels=self.channels)

    def statistics(self, samples: int = _FIRST_LOOK) -> ChannelStatistics:
        """Measures mean and deviation per channel; of images in 0…1."""
        scale = 1.0 if self.arrays else 255.0
        return channel_statistics(self.items, self.read, scale, samples, Terminal())

    def normalisation(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> tuple[list[float], list[float]]:
        """Settles mean and standard deviation per channel: what is given, else ImageNet's for images, else measured."""
        if mean is None or std is None:
            usual = normalisation(self.channels)
            if self.arrays:
                measured = self.statistics()
                usual = tuple(measured.mean), tuple(measured.std)
            mean = usual[0] if mean is None else mean
            std = usual[1] if std is None else std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels:
                raise UserError(
                    f"{name} has {counted(len(values), 'value')} for {counted(self.channels, 'channel')}; `sparkmim "
                    "statistics` measures them"
                )
        return list(mean), list(std)


def is_array(path: str | Path) -> bool:
    """Tells by its ending whether a file holds an array."""
    return str(path).lower().endswith(ARRAY_SUFFIXES)


def open_source(data: Any, channels: int, rank: int) -> Source:
    """Opens a data set: a folder, a text file of paths, or a dataset."""
    if data is None:
        raise UserError("no data given; --data names a folder of images or arrays, or a text file of paths")
    if not isinstance(data, (str, Path)):
        return Source.of(data, channels, rank)
    return Source.of_files(data, channels, rank).check_shape()


def images_source(images: Any, channels: int, rank: int) -> Source:
    """Opens an argument `images`: what `open_source` takes, a single file, or a list of these."""
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
    if path.is_file() and path.name.lower().endswith((*SUFFIXES, *ARRAY_SUFFIXES)):
        return Source.of([str(path)], channels, rank, path)
    return open_source(path, channels, rank)
