"""The samples of pretraining, their order, and the account of those that could not be read."""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from sparkmim.data.decoding import UnreadableImage, check_channels, decode, from_pil
from sparkmim.data.labelled import Labelled
from sparkmim.models.masking import random_visible, visible_per_sample

MAX_STAND_INS = 50
"""So many unreadable images in a row are no accident."""

_ACCEPTED = (
    "a path, a PIL image, a uint8 or float tensor [C, H, W], a numpy array [H, W] or [H, W, C], "
    "or a tuple, list or dict with one of these first, or as 'image'"
)


def counted_seed(*parts: int | str) -> int:
    """A seed of 63 bits that depends on all of `parts`, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class AugmentedDataset(Dataset[dict[str, Any]]):
    """Augmented images, each determined by (seed, epoch, index) alone.

    It is indexed by `(epoch, index)`, or `(epoch, index, repeat)`, as `EpochBatchSampler` does, and returns

    - `image`: float `[C, H, W]`, whatever `transform` makes;
    - `index`: the index that was asked for;
    - `skipped`: how many images were unreadable on the way to the one shown, `index + skipped` (from the start
      again after the last). Where it is 0, the image asked for is the one shown;
    - `unreadable`: for each of them, its path and the reason.

    The image that stands in is cropped as the one asked for would have been, so it is no copy of its own sample in
    the same epoch.

    Args:
        source: paths of images, or a map-style dataset. Items are paths, PIL images, uint8 or float tensors
            `[C, H, W]`, numpy arrays `[H, W]` or `[H, W, C]`, or a tuple or list with one of these first, or a
            dict with one as `image`. Floats must lie in [0, 1]: they stand for 0 to 255, and are rounded to it.
        transform: from uint8 `[C, H, W]` to float `[C, *image_size]`. It may draw from the generators of torch
            (on CPU), numpy and Python, which are seeded around it and then put back.
        seed: of everything random.
        channels: of the images. Files and PIL images are converted to it (1 or 3), tensors and arrays must have it.
        read: from an item of the source and its name to what `transform` takes; None for `to_image`. It raises
            `UnreadableImage` for items to skip.

    Raises:
        TypeError: if the source is of no accepted kind. Reading a sample, if an item is.
        ValueError: if the source is empty. Reading a sample, if an image has the wrong shape or range.
        RuntimeError: reading a sample, if it and the next ones, 50 in a row, are unreadable.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | Dataset[Any],
        transform: Callable[[Any], Tensor],
        seed: int = 0,
        channels: int = 3,
        read: Callable[[Any, str], Any] | None = None,
    ) -> None:
        if isinstance(source, (str, Path)) or not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"source is of type {type(source).__name__}; it takes a list of paths (see find_images), or a dataset "
                "with a length and items"
            )
        if len(source) == 0:
            raise ValueError("source holds no images")
        self._source: Any = source
        self._of_paths = isinstance(source, (list, tuple)) and all(isinstance(item, (str, Path)) for item in source)
        if isinstance(source, (list, tuple)) and self._of_paths:
            if read is None:
                check_channels(channels)
            # One block of memory, which worker processes share. Strings would be copied by counting references.
            self._source = np.array([os.fsencode(path) for path in source])
        self.transform = transform
        self.seed = seed
        self.channels = channels
        self.read = read if read is not None else functools.partial(_image_of, channels=channels)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        epoch, index, *repeat = key
        image, unreadable = self._read(index, counted_seed(self.seed, epoch, index, "image", *repeat))
        return {
            "image": image,
            "index": index,
            "skipped": len(unreadable),
            "unreadable": unreadable,
        }

    def item(self, place: int) -> tuple[Any, str]:
        """An item of the source, and what errors call it."""
        item = self._source[place]
        if self._of_paths:
            item = os.fsdecode(item)
            return item, item
        return item, f"item {place}"

    def _read(self, index: int, seed: int) -> tuple[Tensor, list[str]]:
        """The first readable image from `index` on, transformed, and the complaints about those before."""
        unreadable: list[str] = []
        for offset in range(min(MAX_STAND_INS, len(self))):
            place = (index + offset) % len(self)
            name = f"item {place}"
            try:
                with _seeded(seed):
                    item, name = self.item(place)
                    return self.transform(self.read(item, name)), unreadable
            except UnreadableImage as error:
                unreadable.append(str(error) if error.path else f"{name}: {error.reason}")
            except OSError as error:  # a dataset that opens files itself
                unreadable.append(f"{name}: {error}")
        raise RuntimeError(
            f"{len(unreadable)} images in a row are unreadable, from number {index} of {len(self)} on. "
            f"The first are {'; '.join(unreadable[:3])}"
        )


class PretrainDataset(AugmentedDataset):
    """`AugmentedDataset` with masks, which are determined by (seed, epoch, index) as well.

    Its samples have, in addition, `visible`: bool `[*grid]`, true where a patch is visible. Neither the transform nor
    a stand-in has an influence on it.

    Args:
        source: as for `AugmentedDataset`; also `transform`, `seed`, `channels`, `read`.
        transform: from an image to float `[C, *image_size]`.
        grid: patches along each axis.
        mask_ratio: the share of the patches that is hidden.
        seed: of everything random.
        channels: of the images.
        read: from an item to what `transform` takes.

    Raises:
        ValueError: if the mask is impossible; and what `AugmentedDataset` raises.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | Dataset[Any],
        transform: Callable[[Any], Tensor],
        grid: Sequence[int],
        mask_ratio: float,
        seed: int = 0,
        channels: int = 3,
        read: Callable[[Any, str], Any] | None = None,
    ) -> None:
        super().__init__(source, transform, seed, channels, read)
        visible_per_sample(grid, mask_ratio)  # raises if the mask is impossible
        self.grid = tuple(grid)
        self.mask_ratio = mask_ratio

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        epoch, index = key[:2]
        generator = torch.Generator().manual_seed(counted_seed(self.seed, epoch, index, "mask"))
        return {**super().__getitem__(key), "visible": random_visible(1, self.grid, self.mask_ratio, generator)[0]}


class LabelledDataset(AugmentedDataset):
    """`AugmentedDataset` with `label` in its samples: that of the image shown, if another stands in.

    Args:
        images: with their labels.
        transform: from an image to float `[C, *image_size]`.
        seed: of everything random.
        channels: of the images.
        read: from an item to what `transform` takes.
    """

    def __init__(
        self,
        images: Labelled,
        transform: Callable[[Any], Tensor],
        seed: int = 0,
        channels: int = 3,
        read: Callable[[Any, str], Any] | None = None,
    ) -> None:
        super().__init__(images.items, transform, seed, channels, read)
        self.labels = images.labels
        self.classes = images.classes

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        sample = super().__getitem__(key)
        shown = (sample["index"] + sample["skipped"]) % len(self)
        return {**sample, "label": int(self.labels[shown])}


class TargetDataset(AugmentedDataset):
    """`AugmentedDataset` of images with boxes or label maps: its samples have `target` in addition, which belongs to
    the image shown.

    Args:
        images: a data set of images and targets.
        transform: from both, in a tuple, to both.
        seed: of everything random.
    """

    def __init__(self, images: Dataset[Any], transform: Callable[[Any], Any], seed: int = 0) -> None:
        super().__init__(images, transform, seed, read=_as_it_is)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        sample = super().__getitem__(key)
        image, target = sample["image"]
        return {**sample, "image": image, "target": target}


def _as_it_is(item: Any, name: str) -> Any:
    return item


def _image_of(item: Any, name: str, channels: int) -> Tensor:
    return to_image(item, channels, name)


def to_image(item: Any, channels: int, name: str = "item") -> Tensor:
    """The image in an item of a dataset: uint8 `[channels, H, W]`. See `AugmentedDataset` for what is accepted.

    Raises:
        TypeError: if there is no image in it.
        ValueError: if a tensor or array has the wrong shape or range.
        UnreadableImage: if the file or PIL image can't be read.
    """
    if isinstance(item, Mapping):
        if "image" not in item:
            raise TypeError(f"{name} is a dict of {', '.join(map(repr, item)) or 'nothing'}, without 'image'")
        item = item["image"]
    elif isinstance(item, (tuple, list)):
        if not item:
            raise TypeError(f"{name} is an empty {type(item).__name__}; accepted is {_ACCEPTED}")
        item = item[0]
    if isinstance(item, (str, Path)):
        return decode(item, channels)
    if isinstance(item, Image.Image):
        return from_pil(item, channels, name)
    if isinstance(item, np.ndarray):
        if item.ndim not in (2, 3):
            raise ValueError(f"{name} is an array of shape {list(item.shape)}; images are [H, W] or [H, W, C]")
        pixels = torch.from_numpy(np.array(item))  # a copy: arrays may be read-only or flipped
        item = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    elif not isinstance(item, Tensor):
        raise TypeError(f"{name} is of type {type(item).__name__}; accepted is {_ACCEPTED}")
    return _check_tensor(item.as_subclass(Tensor), channels, name)


def _check_tensor(image: Tensor, channels: int, name: str) -> Tensor:
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(f"{name} is a tensor of shape {list(image.shape)}; images are [C, H, W]")
    if image.shape[0] != channels:
        hint = "; arrays are [H, W, C] and tensors [C, H, W]" if image.shape[-1] == channels else ""
        raise ValueError(f"{name} has {image.shape[0]} channels, but channels is {channels}{hint}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"{name} is of {image.dtype}; images are uint8, or float in [0, 1]")
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # so that NaN fails
        raise ValueError(
            f"{name} has floats from {low:.3g} to {high:.3g}; they must lie in [0, 1]. "
            "Leave normalising to the transform"
        )
    return image.mul(255).round().to(torch.uint8)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of torch (on CPU), numpy and Python, and puts them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (transforms may use it)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed the GPU, where the network draws from.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of samples: tensors `image`, `visible`, `index` and `skipped`, stacked, and one list `unreadable`."""
    batch: dict[str, Any] = default_collate(
        [{key: value for key, value in sample.items() if key != "unreadable"} for sample in samples]
    )
    batch["unreadable"] = [complaint for sample in samples for complaint in sample["unreadable"]]
    return batch


class EpochBatchSampler(Sampler[list[tuple[int, ...]]]):
    """The batches of one epoch for one process, as lists of `(epoch, index)`.

    The epoch's order is drawn from (seed, epoch). Each step takes the next `batch_size · world_size` of it, of
    which each process takes its `batch_size` in turn: how many processes share a step changes no step. What
    does not fill a last step is left out, and comes up in other epochs.

    Args:
        num_samples: size of the dataset.
        batch_size: samples per step and process.
        rank: which process this is.
        world_size: how many there are.
        seed: of the order.
        epoch: which one.
        start_step: the step to begin with, to resume within an epoch.
        repeats: times that each image stands in a row in the order (repeated augmentation, Hoffer et al., CVPR 2020).
            An epoch stays as long, and so shows fewer images; its batches hold `(epoch, index, repeat)`.

    Raises:
        ValueError: if the dataset does not fill one step, or an argument is out of range.

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
            raise ValueError(f"batch_size {batch_size}, rank {rank} and world_size {world_size} make no sense")
        if num_samples < batch_size * world_size:
            largest = num_samples // world_size
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            advice = f"use a batch size of at most {largest}{processes}" if largest else "use fewer processes"
            raise ValueError(
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
            raise ValueError(f"start_step is {start_step}; an epoch has {len(self)} steps")

    def __len__(self) -> int:
        """Steps of the whole epoch, wherever iteration starts."""
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


class SkipLog:
    """The account of unreadable images, in the process that trains.

    Args:
        max_fraction: the share of samples that may be replaced by others.
        epoch_size: samples that this process sees in an epoch, if known. No share is judged on fewer than 100
            samples, or than one epoch.

    Attributes:
        seen: samples so far.
        count: those among them that were replaced.
        unique: what was unreadable, each once, in the order it came up: path and reason.
    """

    def __init__(self, max_fraction: float = 0.1, epoch_size: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.enough = 100 if epoch_size is None else min(100, epoch_size)
        self.seen = 0
        self.count = 0
        self._unique: dict[str, None] = {}

    @property
    def unique(self) -> list[str]:
        return list(self._unique)

    def add(self, batch: Mapping[str, Any]) -> list[str]:
        """Takes a batch into account, as `collate` makes it. Returns what had not been known as unreadable before."""
        self.seen += len(batch["image"])
        if not batch["unreadable"]:  # nearly always, and it keeps a device from waiting for the line below
            return []
        self.count += int((batch["skipped"] > 0).sum())
        new = [complaint for complaint in dict.fromkeys(batch["unreadable"]) if complaint not in self._unique]
        self._unique.update(dict.fromkeys(new))
        return new

    def check(self, seen: int | None = None) -> None:
        """Raises if too much is unreadable.

        Args:
            seen: samples so far, if not all of them went through `add`.

        Raises:
            RuntimeError: if more than `max_fraction` of them were replaced.
        """
        seen = self.seen if seen is None else seen
        if seen >= self.enough and self.count > self.max_fraction * seen:
            raise RuntimeError(
                f"{self.count / seen:.1%} of the images seen are unreadable ({self.count:,} of {seen:,}), more than "
                f"the {self.max_fraction:.1%} allowed. The first are {'; '.join(self.unique[:3])}"
            )
