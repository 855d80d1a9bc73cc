"""Signals, volumes and images of any number of channels, as arrays in their own units."""

from __future__ import annotations

import functools
import importlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.data.augmentation import check_crop_and_flip, random_window
from sparkmim.data.decoding import UnreadableImage, check_regular, max_pixels
from sparkmim.data.problems import counted
from sparkmim.data.tiff import TIFF_SUFFIXES, read_tiff
from sparkmim.errors import UserError

Array = npt.NDArray[Any]

ARRAY_SUFFIXES = (".npy", ".npz", ".nii", ".nii.gz")
"""Endings of array files' names. NIfTI needs the extra `nifti`."""

BYTES_PER_PIXEL = 16
"""For each pixel that an image may have, so many bytes may a compressed array have: four channels of floats."""

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def read_array(path: str | Path) -> Array:
    """Reads the array of a file, in its own units and axes; `.npy` is mapped, not loaded. TIFF is `[H, W, C]`.

    A `.npz` file holds one array, or several of which one is named `image` or `data`. A NIfTI volume is turned to the
    closest canonical orientation (right, anterior, superior), and its intensities are scaled by its header.

    Raises:
        UnreadableImage: if the file holds no such array.
        MissingPackage: if the file is NIfTI and nibabel is not installed.
    """
    path = Path(path)
    try:
        check_regular(path)
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return _read_nifti(path)
        if path.name.lower().endswith(TIFF_SUFFIXES):
            return read_tiff(path, max_pixels())
        if path.suffix.lower() == ".npz":
            return _read_npz(path)
        mapped: Array = np.lib.format.open_memmap(path, mode="r")
        return mapped
    except (UnreadableImage, MissingPackage):
        raise
    except Exception as error:  # numpy and nibabel raise anything, from EOFError to zipfile.BadZipFile
        if path.suffix.lower() == ".npy" and zipfile.is_zipfile(path):
            raise UnreadableImage(path, "is a .npz file by its content; give it that ending") from error
        raise UnreadableImage(path, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


class MissingPackage(UserError):
    """A package is not installed that a file needs."""


def _read_npz(path: Path) -> Array:
    with zipfile.ZipFile(path) as archive:
        arrays = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        names: list[str] = [name for name in ("image", "data") if name in arrays] or list(arrays)
        if len(names) != 1 and names[:1] not in (["image"], ["data"]):
            raise UnreadableImage(path, f"holds {', '.join(names) or 'nothing'}; call the array to use 'image'")
        stored = arrays[names[0]]
        _check_bytes(path, stored.file_size)
        with archive.open(stored) as member:
            first = np.lib.format.read_magic(member) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, kind = read_header(member)
            if not kind.hasobject and math.prod(shape) * kind.itemsize != stored.file_size - member.tell():
                raise UnreadableImage(path, f"holds another number of values than its shape {list(shape)} says")
        with archive.open(stored) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
            return array


def _check_bytes(path: Path, size: int) -> None:
    """Raises an `UnreadableImage` if an array that has to be loaded whole declares too large a size, in bytes."""
    if size > (most := BYTES_PER_PIXEL * max_pixels()):
        raise UnreadableImage(path, f"holds {size / 1e6:,.1f} MB, more than {most / 1e6:,.1f} MB (--max-megapixels)")


def _read_nifti(path: Path) -> Array:
    try:
        nibabel: Any = importlib.import_module("nibabel")
    except ImportError as error:
        raise MissingPackage(f"{path} is a NIfTI volume; reading it needs `pip install 'sparkmim[nifti]'`") from error
    volume = nibabel.load(path)
    _check_bytes(path, math.prod(volume.shape) * volume.get_data_dtype().itemsize)
    volume = nibabel.as_closest_canonical(volume)
    return np.asarray(volume.dataobj)


def channels_first(array: Array, channels: int, rank: int) -> Array:
    """Brings `[C, *S]`, `[*S, C]` or, for one channel, `[*S]` to `[C, *S]`, without a copy."""
    if array.dtype.kind not in "biuf":
        raise UserError(f"holds {array.dtype} values; integers or floats are needed")
    if array.size == 0:
        raise UserError(f"is empty, of shape {list(array.shape)}")
    if array.ndim == rank and channels == 1:
        return array[None]
    if array.ndim == rank + 1 and array.shape[0] == channels:
        return array
    if array.ndim == rank + 1 and array.shape[-1] == channels:
        return np.moveaxis(array, -1, 0)
    axes = {1: "L", 2: "H, W", 3: "D, H, W"}[rank]
    raise UserError(
        f"is of shape {list(array.shape)}; for channels {channels} and an image_size of {counted(rank, 'number')} it "
        f"must be [{channels}, {axes}] or [{axes}, {channels}]" + (f" or [{axes}]" if channels == 1 else "")
    )


def to_array(item: Any, channels: int, rank: int, name: str = "item") -> Array:
    """Returns the array in an item of a data set, `[C, *S]` in its own units.

    Items are as for `to_image`, without PIL images.

    Raises:
        TypeError: if the item holds no array.
        UserError: if a tensor or array has another shape.
        UnreadableImage: if a file cannot be read, or holds an array of another shape.
    """
    if isinstance(item, Mapping) and "image" in item:
        item = item["image"]
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, str | Path):
        array = read_array(item)
        try:
            return channels_first(array, channels, rank)
        except ValueError as error:
            raise UnreadableImage(item, str(error)) from error
    if isinstance(item, Tensor):
        item = item.detach().cpu().numpy()
    if not isinstance(item, np.ndarray):
        raise TypeError(
            f"{name} is of type {type(item).__name__}; accepted is a path, a tensor, a numpy array, or a tuple, list "
            "or dict with one of these first, or as 'image'"
        )
    try:
        return channels_first(item, channels, rank)
    except ValueError as error:
        raise UserError(f"{name} {error}") from error


def array_transform(
    image_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: tuple[float, float] = (0.67, 1.0),
    flip: float = 0.0,
) -> Callable[[Array], Tensor]:
    """Makes a transform that crops at random, resizes linearly, mirrors along the last axis, and normalises.

    The counterpart of `pretrain_transform`, from `[C, *S]` in the data's units to float32 `[C, *image_size]`. With more
    than one axis, the crop's sides deviate from the array's proportions by up to 4:3. Of a mapped file, only the crop
    is read. The transform raises `UnreadableImage` if values are not finite.
    """
    check_crop_and_flip(crop_scale, flip)
    return functools.partial(_cropped, WholeArray(image_size, mean, std), crop_scale, flip)


def _cropped(whole: WholeArray, crop_scale: tuple[float, float], flip: float, array: Array) -> Tensor:
    x = whole(array[:, *random_window(array.shape[1:], crop_scale)])
    return x.flip(-1) if torch.rand(()) < flip else x


class WholeArray:
    """Transform of an array `[C, *S]`, without anything random: resized linearly and normalised.

    The counterpart of `eval_transform`. It raises `UnreadableImage` if values are not finite.
    """

    def __init__(self, image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        shape = (-1, *(1,) * len(image_size))
        self.size = tuple(image_size)
        self.mean, self.std = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)

    def __call__(self, array: Array) -> Tensor:
        # A copy: mapped files cannot be written to
        x = resized(torch.from_numpy(np.array(array, dtype=np.float32)), self.size)
        if not bool(torch.isfinite(x).all()):
            raise UnreadableImage("", "holds values that are not finite")
        return (x - self.mean) / self.std


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resizes `[C, *S]` to `[C, *size]` linearly, averaging where that makes it smaller."""
    if tuple(x.shape[1:]) == size:
        return x
    if len(size) == 2:
        return F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]
    smaller = tuple(min(have, want) for have, want in zip(x.shape[1:], size, strict=True))
    averaged = F.interpolate(x[None], size=smaller, mode="area")
    return F.interpolate(averaged, size=size, mode=_LINEAR[len(size)])[0]
