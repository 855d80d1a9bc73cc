"""Input, masked input and reconstruction side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparkmim.models import SparKOutput

HIDDEN = 0.5
"""Grey of hidden patches."""

GAP = 2
"""White pixels between pictures."""


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes the normalisation: `[B, C, H, W]` to RGB in 0…1, `[B, 3, H, W]`; one channel becomes grey."""
    shape = (1, -1, 1, 1)
    pixels = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    return pixels.clamp(0, 1)[:, :3].expand(-1, 3, -1, -1)


def reconstruction_grid(output: SparKOutput, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """One row per image: input, what the encoder sees, the reconstruction with visible patches pasted in.

    Returns:
        RGB in 0…1, `[3, rows, columns]`.
    """
    block = [size // cells for size, cells in zip(output.images.shape[2:], output.visible.shape[1:], strict=True)]
    mask = output.visible.unsqueeze(1)
    for axis, size in enumerate(block, start=2):
        mask = mask.repeat_interleave(size, dim=axis)  # [B, 1, H, W]
    images = to_pixels(output.images, mean, std)
    columns = [images, torch.where(mask, images, HIDDEN), to_pixels(output.reconstruction, mean, std)]
    framed = [torch.nn.functional.pad(column, (GAP,) * 4, value=1.0) for column in columns]
    return torch.cat([torch.cat(list(row), dim=2) for row in zip(*framed, strict=True)], dim=1).cpu()
