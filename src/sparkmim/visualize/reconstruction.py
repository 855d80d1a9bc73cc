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
    """Undoes the normalisation: `[B, C, H, W]` to RGB in 0…1, `[B, 3, H, W]`.

    One or two channels become grey, by the first; of more than three, the first three count.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return shown.clamp(0, 1).expand(-1, 3, -1, -1)


def reconstruction_grid(
    output: SparKOutput, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Tensor:
    """One row per image: input, what the encoder sees, the reconstruction with visible patches pasted in.

    Args:
        output: of images, or of volumes, of which the middle slice along the first axis is shown.
        mean: that images were normalised by, in 0…1; None for arrays in other units, of which two and a half
            deviations to both sides of the mean are shown.
        std: as mean.

    Returns:
        RGB in 0…1, `[3, rows, columns]`.
    """
    channels = output.images.shape[1]
    if mean is None or std is None:
        mean, std = [0.5] * channels, [0.2] * channels
    block = [size // cells for size, cells in zip(output.images.shape[2:], output.visible.shape[1:], strict=True)]
    mask = output.visible.unsqueeze(1)
    for axis, size in enumerate(block, start=2):
        mask = mask.repeat_interleave(size, dim=axis)  # [B, 1, *S]
    images, rebuilt = output.images, output.reconstruction
    if images.ndim == 5:
        middle = images.shape[2] // 2
        images, rebuilt, mask = (x[:, :, middle] for x in (images, rebuilt, mask))
    pixels = to_pixels(images, mean, std)
    columns = [pixels, torch.where(mask, pixels, HIDDEN), to_pixels(rebuilt, mean, std)]
    framed = [torch.nn.functional.pad(column, (GAP,) * 4, value=1.0) for column in columns]
    return torch.cat([torch.cat(list(row), dim=2) for row in zip(*framed, strict=True)], dim=1).cpu()
