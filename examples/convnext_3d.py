"""A plain ConvNeXt for volumes, as an example of a 3-D network of your own.

    sparkmim verify --model examples/convnext_3d.py:convnext_3d --channels 1 --image-size '[64, 64, 64]'
    sparkmim pretrain --model examples/convnext_3d.py:convnext_3d --channels 1 --image-size '[64, 64, 64]' \
        --data scans/ --out runs/scans

`scans/` holds `.nii.gz` volumes (`pip install 'sparkmim[nifti]'`), or `.npy` or `.npz` arrays `[D, H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, D, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Depthwise 7×7×7, and an MLP on every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.expand = nn.Conv3d(channels, 4 * channels, 1)
        self.reduce = nn.Conv3d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, D, H, W]` to the same."""
        return x + self.reduce(F.gelu(self.expand(self.norm(self.depthwise(x)))))


def convnext_3d(
    in_chans: int = 1, depths: Sequence[int] = (1, 1, 2, 1), widths: Sequence[int] = (16, 32, 64, 128)
) -> nn.Module:
    """Four stages, at strides 2, 4, 8 and 16."""
    stages: list[nn.Module] = []
    channels = in_chans
    for depth, width in zip(depths, widths, strict=True):
        downsample = nn.Conv3d(channels, width, 2, stride=2)
        stages.append(nn.Sequential(downsample, ChannelNorm(width), *(Block(width) for _ in range(depth))))
        channels = width
    return nn.Sequential(*stages)
