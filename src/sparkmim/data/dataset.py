"""The samples of pretraining, their order, and the account of those that could not be read."""

from __future__ import annotations

import functools
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
from torch.utils.data import Dataset, default_collate

from sparkmim.data.decoding import UnreadableImage, check_channels, decode, from_pil
from sparkmim.data.labelled import Labelled
from sparkmim.data.samplers import counted_seed
from sparkmim.errors import UnusableData, UserError
from sparkmim.models.masking import random_visible, visible_per_sample

MAX_STAND_INS = 50
"""So many unreadable images in a row are no accident."""

_ACCEPTED = (
    "a path, a PIL image, a uint8 or float tensor [C, H, W], a numpy array [H, W] or [H, W, C], "
    "or a tuple, list or dict with one of these first, or as 'image'"
)


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
            raise UserError("source holds no images")
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
        raise UnusableData(
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
            raise UserError(f"{name} is an array of shape {list(item.shape)}; images are [H, W] or [H, W, C]")
        pixels = torch.from_numpy(np.array(item))  # a copy: arrays may be read-only or flipped
        item = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    elif not isinstance(item, Tensor):
        raise TypeError(f"{name} is of type {type(item).__name__}; accepted is {_ACCEPTED}")
    return _check_tensor(item.as_subclass(Tensor), channels, name)


def _check_tensor(image: Tensor, channels: int, name: str) -> Tensor:
    if image.ndim != 3 or image.numel() == 0:
        raise UserError(f"{name} is a tensor of shape {list(image.shape)}; images are [C, H, W]")
    if image.shape[0] != channels:
        hint = "; arrays are [H, W, C] and tensors [C, H, W]" if image.shape[-1] == channels else ""
        raise UserError(f"{name} has {image.shape[0]} channels, but channels is {channels}{hint}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"{name} is of {image.dtype}; images are uint8, or float in [0, 1]")
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # so that NaN fails
        raise UserError(
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
