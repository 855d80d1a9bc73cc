"""What becomes of an image and its label map before a network sees them.

Images are uint8, or float32 in units of their own, which only normalisation changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparkmim.data.detection import detection_resize, to_float
from sparkmim.data.label_maps import IGNORED
from sparkmim.errors import UserError

SCALES = (0.5, 2.0)
"""By so much an image is resized at random, relative to its usual size."""

LONGEST = 4
"""In evaluation, the longer side is so many times the usual shorter one at most."""


def segmentation_transform(
    shortest: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: float = 0.5,
    jitter: float = 0.0,
    arrays: bool = False,
) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Random size, crop, mirroring and colours, as usual in segmentation.

    The shorter side is resized to between 0.5 and 2 times `shortest`, a square cut out at random, and mirrored. Where
    the image is smaller than the square, it is filled up with the mean colour and pixels that count for nothing.

    Args:
        shortest: usual length of the shorter side, in pixels.
        crop: side of the square, in pixels.
        mean: of each channel, of images in 0…1, or of arrays in their units.
        std: as mean.
        flip: how often images are mirrored.
        jitter: of 8-bit images, by what share contrast and saturation change at most; brightness by a quarter of it,
            the hue by a tenth of the circle times it.
        arrays: whether images are float32 in units of their own, which have no colours to change.

    Returns:
        from an item of `SegmentationImages` to float32 `[C, crop, crop]` and long `[crop, crop]`.

    Raises:
        ValueError: if an argument is out of range.
    """
    if shortest < 1 or crop < 1:
        raise UserError(f"short_side is {shortest} and crop {crop}; they are sizes in pixels, above 0")
    if not 0 <= flip <= 1:
        raise UserError(f"flip is {flip}; it is a probability between 0 and 1")
    if not 0 <= jitter <= 1:
        raise UserError(f"jitter is {jitter}; it is a share between 0 (none) and 1")
    filling = list(mean) if arrays else [round(255 * value) for value in mean]
    low, high = (round(scale * shortest) for scale in SCALES)
    steps: list[nn.Module] = [
        v2.RandomShortestSize(list(range(max(1, low), high + 1))),
        v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: filling, tv_tensors.Mask: IGNORED}),
        v2.RandomHorizontalFlip(flip),
        *([v2.ColorJitter(jitter / 4, jitter, jitter, jitter / 10)] if jitter and not arrays else []),
        to_float(),
        v2.Normalize(list(mean), list(std)),
        v2.ToDtype({tv_tensors.Mask: torch.int64, "others": None}),
        v2.ToPureTensor(),
    ]
    transform: Callable[[Any], tuple[Tensor, Tensor]] = v2.Compose(steps)
    return transform


def segmentation_resize(shortest: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """For evaluation, from `[C, H, W]` to float32: resized as in training, with nothing random, and normalised.

    The shorter side becomes `shortest`, unless the longer one would be more than four times that.

    Raises:
        ValueError: if the size is out of range.
    """
    resize = detection_resize(shortest, LONGEST * shortest)
    whole: Callable[[Tensor], Tensor] = v2.Compose([resize, v2.Normalize(list(mean), list(std))])
    return whole
