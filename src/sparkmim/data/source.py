"""What `data` stands for: image files, array files, or a dataset, and how its items are read."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparkmim.data.arrays import ARRAY_SUFFIXES, to_array
from sparkmim.data.augmentation import are_long, normalisation
from sparkmim.data.decoding import UnreadableImage, highest_of_16_bits, size_text, stored_size, to_image
from sparkmim.data.discovery import SUFFIXES, find_images
from sparkmim.data.problems import counted, few, print_notes, report
from sparkmim.data.statistics import ChannelStatistics, channel_statistics
from sparkmim.data.tiff import TIFF_SUFFIXES, holds_array
from sparkmim.errors import MissingPath, UserError
from sparkmim.files import are_paths
from sparkmim.machine import is_main_process
from sparkmim.terminal import Terminal

_LARGEST = {"mean": 1.0, "std": 5.0}
"""Of images in 0…1; those of 0…255 are larger. Deviations above 1 are a choice of scale."""

_LOOKS = 25
"""Images looked at to learn what the network does not see of them."""

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

        Image files hold 1 or 3 channels and two axes: anything else is read as arrays. Paths are of the kind that most
        of them are of.
        """
        arrays = rank != 2 or channels not in (1, 3)
        if are_paths(items):
            if not arrays:
                arrays = 2 * sum(_are_arrays(items, False)) > len(items)
            elif not any(_are_arrays(items, rank == 2)):
                kind = counted(channels, "channel") if rank == 2 else {1: "signals", 3: "volumes"}[rank]
                raise UserError(
                    f"{name} holds image files only, which have 1 or 3 channels and two axes; {kind} are read from "
                    f"{', '.join(ARRAY_SUFFIXES)}{' and TIFF' if rank == 2 else ''} files"
                )
        return cls(items, arrays, channels, rank)

    @classmethod
    def of_files(cls, data: str | Path, channels: int, rank: int) -> Source:
        """Finds the files of a folder or a text file, as `find_images` does; of images and arrays, one kind.

        What is left out is said on stderr.
        """
        others: Counter[str] = Counter()
        paths = find_images(data, suffixes=(*SUFFIXES, *ARRAY_SUFFIXES), others=others)
        found = cls.of(paths, channels, rank, data)
        kinds = _are_arrays(paths, found.arrays and rank == 2)
        kept = [path for path, kind in zip(paths, kinds, strict=True) if kind == found.arrays]
        notes: list[str] = []
        these, word = ("array files", "image file") if found.arrays else ("image files", "array file")
        lone = [os.path.relpath(path, data) for path, kind in zip(paths, kinds, strict=True) if kind != found.arrays]
        report(notes, lone, f"left out of {data}, as the other {len(kept):,} are {these}", word)
        endings = [f"{count:,} {ending}" for ending, count in others.most_common()]
        if endings:
            notes.append(f"{counted(others.total(), 'file')} left out of {data} for their ending: {few(endings)}")
        print_notes(Terminal(quiet=not is_main_process()), notes)
        return cls(kept, found.arrays, channels, rank)

    def checked(self) -> Source:
        """Returns itself, if the first of array files has a shape that fits, in a format that can be read here."""
        if self.arrays and isinstance(self.items[0], (str, Path)):
            try:
                self.read(self.items[0])
            except UnreadableImage as error:
                if "is of shape" in error.reason:
                    raise UserError(str(error)) from error
        return self

    def say_loss(self, image_size: Sequence[int]) -> None:
        """Says on stderr what the network does not see of image files, by some of them.

        That is if most have other proportions than its input, or if 16-bit files use little of their range.
        """
        paths = self.items if isinstance(self.items, list) and all(isinstance(x, str) for x in self.items[:1]) else []
        if self.arrays or not paths:
            return
        sizes, highest, notes = [], 0, []
        for path in paths[:: max(1, len(paths) // _LOOKS)]:
            with suppress(UnreadableImage):
                size, turned = stored_size(path)
                sizes.append(size[::-1] if turned else size)
                highest = max(highest, highest_of_16_bits(path) or 0)
        usual = sorted(sizes, key=lambda size: size[1] / size[0])[len(sizes) // 2] if sizes else image_size
        if are_long(usual, image_size):
            seen = size_text(image_size)
            note = f"many images are about {size_text(usual)}; they are squeezed into the network's {seen}"
            notes.append(f"{note}, unless --image-size has their proportions (height, then width)")
        if 0 < highest < 0.25 * 65535:
            levels = counted(highest // 257 + 1, "level")
            notes.append(
                f"16-bit images reach {highest:,} of 65,535, of which the network sees {levels} of 256; save them as "
                ".npy or float TIFF, which keep their units"
            )
        print_notes(Terminal(quiet=not is_main_process()), notes)

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
        both = {"mean": mean, "std": std}
        for name, values in both.items():
            if len(values) != self.channels:
                raise UserError(
                    f"{name} has {counted(len(values), 'value')} for {counted(self.channels, 'channel')}; `sparkmim "
                    "statistics` measures them"
                )
        large = [name for name, most in _LARGEST.items() if max(map(abs, both[name])) > most]
        if large and not self.arrays:
            shown = " ".join(f"{value:g}" for value in both[large[0]])
            right = [f"--{name} {' '.join(f'{value / 255:.4g}' for value in both[name])}" for name in large]
            raise UserError(f"{large[0]} is {shown}, but images are in 0…1 here, not in 0…255; give {' '.join(right)}")
        return list(mean), list(std)


def _are_arrays(paths: Sequence[str | Path], tiff: bool) -> list[bool]:
    """Tells which files hold arrays, by their endings: TIFF files if `tiff`, or if the first of them holds one."""
    names = [str(path).lower() for path in paths]
    first = next((path for path, name in zip(paths, names, strict=True) if name.endswith(TIFF_SUFFIXES)), None)
    tiff = first is not None and (tiff or holds_array(first))
    return [name.endswith((*ARRAY_SUFFIXES, *TIFF_SUFFIXES) if tiff else ARRAY_SUFFIXES) for name in names]


def open_source(data: Any, channels: int, rank: int) -> Source:
    """Opens a data set: a folder, a text file of paths, several of these or of files, or a dataset.

    What several of them name twice is taken once.
    """
    if data is None:
        raise UserError("no data given; --data names a folder of images or arrays, or a text file of paths")
    if are_paths(data):
        several = images_source(data, channels, rank)
        return replace(several, items=list(dict.fromkeys(several.items)))
    if not isinstance(data, (str, Path)):
        if hasattr(data, "__len__") and not len(data):
            raise UserError("data is a dataset without items; give images to train on")
        return Source.of(data, channels, rank)
    return Source.of_files(data, channels, rank).checked()  # before a run begins


def images_source(images: Any, channels: int, rank: int) -> Source:
    """Opens an argument `images`: what `open_source` takes, a single file, or a list of these."""
    if images is None:
        raise UserError("no images given; --images names a folder, an image, or a text file of paths")
    if are_paths(images):
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
