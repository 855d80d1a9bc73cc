"""What the pictures share: tensors as colours, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparkmim.models import SparKOutput

if TYPE_CHECKING:
    pass

HIDDEN = 0.5
"""Grey of hidden patches."""

GAP = 2
"""White pixels between the pictures of a grid."""


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes the normalisation: `[B, C, H, W]` to RGB in 0…1, `[B, 3, H, W]`.

    One or two channels become grey, by the first; of more than three, the first three count.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return shown.clamp(0, 1).expand(-1, 3, -1, -1)


def middle_slice(images: Tensor) -> Tensor:
    """`[B, C, D, H, W]` to `[B, C, H, W]`, at half the depth; images pass."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


def to_array(pixels: Tensor) -> Any:
    """RGB `[B, 3, H, W]` to float32 `[B, H, W, 3]` of numpy."""
    return pixels.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Tones:
    """How normalised values become colours.

    Attributes:
        mean: that images were normalised by, in 0…1; of arrays in other units, 0.5, so that two and a half deviations
            to both sides of the mean are shown.
        std: as mean; of arrays, 0.2.
    """

    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tones:
        """These mean and deviation; None for arrays in units of their own."""
        if mean is None or std is None:
            return cls([0.5] * channels, [0.2] * channels)
        return cls(mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised `[B, C, *S]` to RGB in 0…1, `[B, 3, H, W]`; of volumes, the middle slice."""
        return to_pixels(middle_slice(images), self.mean, self.std)


def at_pixels(visible: Tensor, size: Sequence[int]) -> Tensor:
    """A mask of patches `[B, *grid]` as one of pixels, `[B, 1, *size]`."""
    mask = visible.unsqueeze(1)
    for axis, (pixels, cells) in enumerate(zip(size, visible.shape[1:], strict=True), start=2):
        mask = mask.repeat_interleave(pixels // cells, dim=axis)
    return mask


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
    tones = Tones.of(output.images.shape[1], mean, std)
    mask = at_pixels(output.visible, output.images.shape[2:])
    pixels = tones(output.images)
    columns = [pixels, torch.where(middle_slice(mask), pixels, HIDDEN), tones(output.reconstruction)]
    framed = [torch.nn.functional.pad(column, (GAP,) * 4, value=1.0) for column in columns]
    return torch.cat([torch.cat(list(row), dim=2) for row in zip(*framed, strict=True)], dim=1).cpu()
