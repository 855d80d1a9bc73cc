"""Tensors as colours: normalised images and masks as RGB pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkmim.models import SparKOutput

HIDDEN = 0.5
"""Grey of hidden patches."""

GAP = 2
"""Width in pixels of the white frame around each picture of a grid."""


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes the normalisation of images: `[B, C, H, W]` to RGB in 0…1, `[B, 3, H, W]`.

    Shows one or two channels as the first in grey, and the first three of more than three.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return shown.clamp(0, 1).expand(-1, 3, -1, -1)


def to_array(pixels: Tensor) -> Any:
    """Converts RGB `[B, 3, H, W]` to a float32 numpy array `[B, H, W, 3]`."""
    return pixels.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()


def middle_slice(images: Tensor) -> Tensor:
    """Returns the slice at half the depth, `[B, C, D, H, W]` to `[B, C, H, W]`; leaves images as they are."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


def at_pixels(visible: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarges a mask of patches `[B, *grid]` to one of pixels, `[B, 1, *size]`."""
    mask = visible.unsqueeze(1)
    for axis, (pixels, cells) in enumerate(zip(size, visible.shape[1:], strict=True), start=2):
        mask = mask.repeat_interleave(pixels // cells, dim=axis)
    return mask


@dataclass(frozen=True)
class Tones:
    """Conversion to colours of values normalised by a mean and deviation in 0…1."""

    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tones:
        """Returns the tones for a mean and deviation; for None, of arrays, shows 2.5 deviations around the mean."""
        if mean is None or std is None:
            return cls([0.5] * channels, [0.2] * channels)
        return cls(mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Converts normalised `[B, C, *S]` to RGB in 0…1, `[B, 3, H, W]`; for volumes, the middle slice."""
        return to_pixels(middle_slice(images), self.mean, self.std)


def reconstruction_grid(
    output: SparKOutput, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    """Draws a row per image: input, masked input, and the reconstruction with visible patches pasted in.

    Args:
        output: of images, or of volumes, which are shown by their middle slice along the first axis.
        mean: mean that images were normalised by, in 0…1; None for arrays in other units.
        std: as mean.

    Returns:
        RGB in 0…1, `[3, rows, columns]`.
    """
    tones = Tones.of(output.images.shape[1], mean, std)
    mask = at_pixels(output.visible, output.images.shape[2:])
    pixels = tones(output.images)
    columns = [pixels, torch.where(middle_slice(mask), pixels, HIDDEN), tones(output.reconstruction)]
    framed = [torch.nn.functional.pad(column, (GAP,) * 4, value=1.0) for column in columns]
    return torch.cat([torch.cat(list(row), dim=2) for row in zip(*framed, strict=True)], dim=1).cpu()
