"""Transforms of images with label maps, for segmenters.

Images are uint8, or float32 in their own units, which only normalisation changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparkmim.data.detection_transforms import detection_resize, to_float
from sparkmim.data.label_maps import IGNORED

SCALES = (0.5, 2.0)
"""Range of random sizes, relative to the usual one."""

LONGEST = 4
"""Limit of the longer side in evaluation, relative to the usual shorter one."""


def segmentation_transform(
    shortest: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: float = 0.5,
    jitter: float = 0.0,
    arrays: bool = False,
) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Makes the usual augmentation for segmentation: random size, crop, mirroring and colours.

    The shorter side is resized to between 0.5 and 2 times `shortest`, and a square is cut out at random and mirrored.
    If the image is smaller than the square, it is padded with the mean colour, and its label map with `IGNORED`.

    Args:
        shortest, crop: usual length of the shorter side, and side of the square, in pixels.
        mean, std: per channel, of images in 0…1, or of arrays in their own units.
        flip: probability of mirroring.
        jitter: largest relative change of contrast and saturation; brightness changes by up to a quarter of it, the hue
            by up to a tenth of it times the full circle. Ignored for arrays.
        arrays: whether images are float32 in their own units.

    Returns:
        A function from an item of `SegmentationImages` to float32 `[C, crop, crop]` and long `[crop, crop]`.
    """
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
    """Makes the transform for evaluation, from `[C, H, W]` to normalised float32, without anything random.

    The shorter side is resized to `shortest`, unless the longer one would exceed four times that.
    """
    resize = detection_resize(shortest, LONGEST * shortest)
    whole: Callable[[Tensor], Tensor] = v2.Compose([resize, v2.Normalize(list(mean), list(std))])
    return whole
