"""Transforms of decoded images, for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from sparkmim.errors import UserError

Transform = Callable[[Tensor], Tensor]
"""From uint8 `[C, H, W]` of any size to float32 `[C, *image_size]`."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey of an image (ITU-R BT.601)."""


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the default mean and standard deviation of images.

    ImageNet's for 3 channels, else the average of its three for every channel.

    Example:
        >>> normalisation(3)
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,) * channels, (sum(IMAGENET_STD) / 3,) * channels


def pretrain_transform(
    image_size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_scale: tuple[float, float] = (0.67, 1.0),
    flip: float = 0.5,
    jitter: float = 0.0,
) -> Transform:
    """Makes the paper's augmentation: a random crop, resized with bicubic filtering, and a horizontal flip.

    The crop covers `crop_scale` of the image's area; its aspect ratio lies between 3:4 and 4:3. Mean and std are those
    of values in [0, 1]. With `jitter`, colours change too (`ChangeColours`).
    """
    to_float, normalise = _to_float(mean, std)
    colours = [ChangeColours(jitter)] if jitter else []
    transform: Transform = v2.Compose([
        *_crop_and_flip(image_size, crop_scale, flip), to_float, *colours, normalise
    ])  # fmt: skip
    return transform


CHANGES = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
"""Largest change of colours in SimCLR at strength 1, relative; of hue, in turns."""


class ChangeColours:
    """Changes the colours of an image at random, as SimCLR does (arXiv:2002.05709, appendix A).

    With probability 0.8, `CHANGES` are made in random order; with probability 0.2, the image becomes grey. Together
    they are one affine map of colours (StyleGAN2-ADA, arXiv:2006.06676, appendix B), which takes less time than
    torchvision's `ColorJitter`: hue is a rotation about the axis of greys, and values are clamped once. Images that
    have not three channels change in brightness and contrast alone.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, image: Tensor) -> Tensor:
        """Float `[C, H, W]` in [0, 1] to the same."""
        channels = len(image)
        change, to_grey, *draws = torch.rand(2 + len(CHANGES)).tolist()
        mean = image.mean((1, 2)).numpy()
        colours = np.eye(channels, channels + 1)
        if change < 0.8:
            kinds = list(CHANGES)[: 4 if channels == 3 else 2]
            for place in torch.randperm(len(kinds)).tolist():
                kind = kinds[place]
                colours = adjust(colours, kind, CHANGES[kind] * self.strength * (2 * draws[place] - 1), mean)
        if to_grey < 0.2 and channels == 3:
            colours = adjust(colours, "saturation", -1, mean)
        changed = torch.from_numpy(colours).to(image)
        return torch.addmm(changed[:, -1:], changed[:, :-1], image.flatten(1)).clamp_(0, 1).view_as(image)


def adjust(colours: NDArray[np.float64], kind: str, amount: float, mean: NDArray[Any]) -> NDArray[np.float64]:
    """Returns an affine map of colours `[C, C + 1]`, the offset last, followed by one of `CHANGES`.

    Args:
        colours: the map so far.
        kind: of change.
        amount: relative; -1 is black, grey all over, or without colour. Of hue, in turns.
        mean: colour of the image on average, `[C]`.
    """
    if kind == "hue":
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # Rodrigues' formula
        angle = 2 * math.pi * amount
        rotation = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
        return rotation @ colours
    luma = np.array(LUMA) if len(colours) == 3 else np.full(len(colours), 1 / len(colours))
    found = (1 + amount) * colours
    if kind == "contrast":  # away from the grey of the image on average
        found[:, -1] -= amount * (luma @ (colours[:, :-1] @ mean + colours[:, -1]))
    elif kind == "saturation":  # away from each pixel's own grey
        found -= amount * (luma @ colours)
    return found


def check_crop_and_flip(crop_scale: tuple[float, float], flip: float) -> None:
    """Raises a `UserError` if one is out of range."""
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"crop_scale is {tuple(crop_scale)}; it takes 0 < smallest <= largest <= 1")
    if not 0 <= flip <= 1:
        raise UserError(f"flip is {flip}; it is a probability between 0 and 1")


def _crop_and_flip(image_size: tuple[int, int], crop_scale: tuple[float, float], flip: float) -> list[Transform]:
    check_crop_and_flip(crop_scale, flip)
    return [RandomCrop(image_size, crop_scale), v2.RandomHorizontalFlip(flip)]


_STRETCH = math.log(4 / 3)

LONG = 3
"""Images of which one side is more than this many times the other are cropped with their own proportions."""


class RandomCrop:
    """Crops at random, and resizes with bicubic filtering.

    The crop covers `crop_scale` of the image's area. Its aspect ratio lies between 3:4 and 4:3, as usual; of `LONG`
    images, of which the usual crop would be the middle alone, it differs from their own by up to 4:3.
    """

    def __init__(self, image_size: tuple[int, int], crop_scale: tuple[float, float]) -> None:
        how: dict[str, Any] = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
        self.usual = v2.RandomResizedCrop(image_size, crop_scale, (3 / 4, 4 / 3), **how)
        self.resize = v2.Resize(image_size, **how)
        self.crop_scale = crop_scale

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 `[C, H, W]` to `[C, *image_size]`."""
        if max(image.shape[1:]) <= LONG * min(image.shape[1:]):
            cropped: Tensor = self.usual(image)
        else:
            cropped = self.resize(image[:, *random_window(image.shape[1:], self.crop_scale)])
        return cropped


def random_window(shape: Sequence[int], scale: tuple[float, float]) -> list[slice]:
    """Draws a window that covers `scale` of an array's volume; its sides deviate from the array's by up to 4:3."""
    rank = len(shape)
    low, high = scale
    side = (low + (high - low) * torch.rand(()).item()) ** (1 / rank)
    stretch = (torch.rand(rank) - 0.5) * _STRETCH if rank > 1 else torch.zeros(1)
    sides = (side * torch.exp(stretch - stretch.mean())).clamp(max=1).tolist()
    where = []
    for extent, share in zip(shape, sides, strict=True):
        length = max(1, round(extent * share))
        start = int(torch.randint(extent - length + 1, ()))
        where.append(slice(start, start + length))
    return where


Augment = Literal["trivial", "auto", "none"]


def classify_transform(
    image_size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    augment: Augment = "trivial",
    erase: float = 0.25,
) -> Transform:
    """Makes the paper's augmentation for fine-tuning: that of timm's ImageNet recipes, with TrivialAugment.

    A random crop, resized with bicubic filtering, a flip, TrivialAugment (Müller and Hutter, ICCV 2021, torchvision's)
    or AutoAugment's policy for ImageNet, and random erasing with noise (timm's), with probability `erase`.
    """
    if augment not in get_args(Augment):
        raise UserError(f"there is no augmentation {augment!r}; choose trivial, auto or none")
    if not 0 <= erase <= 1:
        raise UserError(f"erase is {erase}; it is a probability between 0 and 1")
    bilinear = v2.InterpolationMode.BILINEAR  # the finest that torchvision warps tensors with
    steps: list[Transform] = _crop_and_flip(image_size, crop_scale, flip)
    if augment == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=bilinear))
    elif augment == "auto":
        steps.append(v2.AutoAugment(interpolation=bilinear))
    steps += _to_float(mean, std)
    if erase:
        erasing: Any = RandomErasing  # untyped
        steps.append(erasing(erase, mode="pixel", device="cpu"))
    transform: Transform = v2.Compose(steps)
    return transform


def eval_transform(
    image_size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop: float | None = 0.875,
) -> Transform:
    """Makes a transform without anything random: resizes the shorter side, and crops the centre.

    The longer side of the result is the share `crop` of the resized shorter side: 224 of 256 by default. With None, the
    whole image is resized to `image_size`, whatever its shape; and so is one of which the crop would show less than
    `LEAST_SHOWN`, such as a line of 640×64.
    """
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"crop is {crop}; it is a share, above 0 and at most 1")
    transform: Transform = v2.Compose([_Centre(image_size, crop), *_to_float(mean, std)])
    return transform


LEAST_SHOWN = 0.25
"""Share of an image's area that the centre crop shows at least; else the whole image is resized."""


class _Centre:
    """Crops the centre, or resizes the whole image, as `eval_transform` describes."""

    def __init__(self, image_size: tuple[int, int], crop: float | None) -> None:
        how: dict[str, Any] = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
        self.image_size = image_size
        self.whole = v2.Resize(image_size, **how)
        self.shorter = 0
        if crop is not None:
            self.shorter = int(max(image_size) / crop)  # rounded down, as in timm
            self.centre = v2.Compose([v2.Resize(self.shorter, **how), v2.CenterCrop(image_size)])

    def __call__(self, image: Tensor) -> Tensor:
        resized: Tensor = self.whole(image) if self._is_whole(image.shape[1:]) else self.centre(image)
        return resized

    def _is_whole(self, size: Sequence[int]) -> bool:
        if not self.shorter:
            return True
        shown = math.prod(self.image_size) / (math.prod(size) * (self.shorter / min(size)) ** 2)
        return shown < LEAST_SHOWN


def are_long(size: Sequence[int], image_size: Sequence[int]) -> bool:
    """Whether the proportions of height and width differ from those of the network's input by more than `LONG`."""
    relative = (size[1] / size[0]) / (image_size[1] / image_size[0])
    return not 1 / LONG <= relative <= LONG


def _to_float(mean: Sequence[float], std: Sequence[float]) -> tuple[Transform, Transform]:
    if len(mean) != len(std):
        raise UserError(f"mean has {len(mean)} values and std {len(std)}; both take one per channel")
    return v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))
