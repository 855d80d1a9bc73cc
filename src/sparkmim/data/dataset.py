"""Data sets for training, whose samples depend on seed, epoch and index alone."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from sparkmim.data.decoding import UnreadableImage, check_channels, name_of, to_image
from sparkmim.data.held_out import names_of
from sparkmim.data.labelled import Labelled
from sparkmim.data.samplers import counted_seed
from sparkmim.errors import UnusableData, UserError
from sparkmim.files import are_paths
from sparkmim.machine import generators_restored
from sparkmim.models.masking import random_visible, visible_per_sample

MAX_STAND_INS = 50
"""Give up after this many unreadable images in a row."""


class SharedPaths:
    """A sequence of paths in one block of memory, which loader workers share.

    The strings of a list would be copied into every worker, because counting references writes to them.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._block = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._block)

    def __getitem__(self, place: int) -> str:
        return os.fsdecode(self._block[place])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self._block)


def share_paths(items: Any) -> Any:
    """Returns a list of paths as `SharedPaths`, and any other data set unchanged."""
    return SharedPaths(items) if are_paths(items) else items


class AugmentedDataset(Dataset[dict[str, Any]]):
    """Augmented images, each determined by (seed, epoch, index) alone.

    It is indexed by `(epoch, index)` or `(epoch, index, repeat)`, as `EpochBatchSampler` does, and returns

    - `image`: float `[C, H, W]`, the result of `transform`;
    - `index`: the requested index;
    - `skipped`: number of unreadable images passed over: the image shown is number `index + skipped`, counted from
      the start again after the last. 0 if the requested image is shown;
    - `unreadable`: path and reason of each of them.

    A stand-in is cropped as the requested image would have been, so it differs from its own sample in the same epoch.
    Reading a sample raises `UnusableData` if 50 images in a row are unreadable.

    Args:
        source: paths of images, or a map-style dataset. For its items see `to_image`.
        transform: from uint8 `[C, H, W]` to float `[C, *image_size]`. It may draw from the generators of torch
            (on CPU), numpy and Python, which are seeded for it and restored afterwards.
        seed: seed of all random numbers.
        channels: as for `to_image`.
        read: called as `read(item, name=...)`, returns what `transform` takes; None for `to_image`. It raises
            `UnreadableImage` for items to skip. Loader workers that are not forked need it and `transform` to pickle.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | Dataset[Any],
        transform: Callable[[Any], Any],
        seed: int = 0,
        channels: int = 3,
        read: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(source, (str, Path)) or not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"source is of type {type(source).__name__}; it takes a list of paths (see find_images), or a dataset "
                "with a length and items"
            )
        if len(source) == 0:
            raise UserError("source holds no images")
        self._source = share_paths(source)
        if read is None:
            if isinstance(self._source, SharedPaths):
                check_channels(channels)
            read = functools.partial(to_image, channels=channels)
        self.transform = transform
        self.seed = seed
        self.channels = channels
        self.read = read

    def __len__(self) -> int:
        return len(self._source)

    def image_names(self, data: Any) -> list[str] | None:
        """Returns names of the images that stay the same when the data move; None if they have none.

        Args:
            data: what they come from, as for `names_of`.
        """
        if isinstance(self._source, SharedPaths):
            return names_of(list(self._source), data)
        found: list[str] | None = getattr(self._source, "names", None)
        return found

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """What loaders call for a batch; putting generators back takes longer than seeding them."""
        with generators_restored(with_gpus=False):
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int, *repeat: int) -> dict[str, Any]:
        image, unreadable = self._read(index, counted_seed(self.seed, epoch, index, "image", *repeat))
        return {"image": image, "index": index, "skipped": len(unreadable), "unreadable": unreadable}

    def _read(self, index: int, seed: int) -> tuple[Any, list[str]]:
        """Returns the first readable image from `index` on, transformed, and the errors of those before."""
        unreadable: list[str] = []
        for offset in range(min(MAX_STAND_INS, len(self))):
            place = (index + offset) % len(self)
            name = f"item {place}"
            try:
                _seed(seed)
                item = self._source[place]
                name = name_of(item, place)
                return self.transform(self.read(item, name=name)), unreadable
            except UnreadableImage as error:
                unreadable.append(str(error) if error.path else f"{name}: {error.reason}")
            except OSError as error:  # a dataset that opens files itself
                unreadable.append(f"{name}: {error}")
        raise UnusableData(
            f"{len(unreadable)} images in a row are unreadable, from number {index} of {len(self)} on; the first is "
            f"{unreadable[0]}"
        )


class PretrainDataset(AugmentedDataset):
    """`AugmentedDataset` with masks, which are determined by (seed, epoch, index) as well.

    Adds `visible` to its samples: bool `[*grid]`, true where a patch is visible. It depends neither on the transform
    nor on whether another image stands in.
    """

    def __init__(
        self,
        source: Sequence[str | Path] | Dataset[Any],
        transform: Callable[[Any], Tensor],
        grid: Sequence[int],
        mask_ratio: float,
        seed: int = 0,
        channels: int = 3,
        read: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(source, transform, seed, channels, read)
        visible_per_sample(grid, mask_ratio)  # raises if the mask is impossible
        self.grid = tuple(grid)
        self.mask_ratio = mask_ratio

    def _sample(self, *key: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self._mask_seed(*key))
        return {**super()._sample(*key), "visible": random_visible(1, self.grid, self.mask_ratio, generator)[0]}

    def _mask_seed(self, epoch: int, index: int, *repeat: int) -> int:
        return counted_seed(self.seed, epoch, index, "mask", *repeat)


class HeldOutDataset(PretrainDataset):
    """`PretrainDataset` whose masks are determined by (seed, name of the image) instead."""

    def __init__(self, *args: Any, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = names

    def _mask_seed(self, epoch: int, index: int, *repeat: int) -> int:
        return counted_seed(self.seed, self.names[index], "mask")


class LabelledDataset(AugmentedDataset):
    """`AugmentedDataset` with `label` in its samples: that of the image shown, if another stands in."""

    def __init__(
        self,
        images: Labelled,
        transform: Callable[[Any], Tensor],
        seed: int = 0,
        channels: int = 3,
        read: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(images.items, transform, seed, channels, read)
        self.labels = images.labels
        self.classes = images.classes

    def _sample(self, *key: int) -> dict[str, Any]:
        sample = super()._sample(*key)
        shown = (sample["index"] + sample["skipped"]) % len(self)
        return {**sample, "label": int(self.labels[shown])}


class TargetDataset(AugmentedDataset):
    """`AugmentedDataset` of pairs of image and target, in its samples as `image` and `target`: that of the image shown.

    `transform` maps such a pair to another.
    """

    def __init__(self, images: Dataset[Any], transform: Callable[[Any], Any], seed: int = 0) -> None:
        super().__init__(images, transform, seed, read=unchanged)

    def _sample(self, *key: int) -> dict[str, Any]:
        sample = super()._sample(*key)
        image, target = sample["image"]
        return {**sample, "image": image, "target": target}


def unchanged(item: Any, name: str = "") -> Any:
    return item


def _seed(seed: int) -> None:
    """Seeds the generators of torch (on CPU), numpy and Python."""
    # Not torch.manual_seed, which also seeds the GPU's generator, from which the network draws.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002 (transforms may use it)


def collate(samples: Sequence[Mapping[str, Any]], lists: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a batch of samples: `unreadable` becomes one list, what `lists` names a list each, all else is stacked."""
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    unreadable: list[str] = sum(columns.pop("unreadable"), [])
    batch = {key: found if key in lists else default_collate(found) for key, found in columns.items()}
    return {**batch, "unreadable": unreadable}


def collate_detection(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Makes a batch of samples of a `TargetDataset` whose images differ in size; they and their targets are lists."""
    return collate(samples, ("image", "target"))
