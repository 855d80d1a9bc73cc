"""The decoder of ConvNeXt V2's masked autoencoder (Woo et al., 2023, arXiv:2301.00808)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.models.decoder import CONVOLUTIONS, from_patches
from sparkmim.sparse import PackedTensor, unpack


class ResponseNorm(nn.Module):
    """Global response normalisation of `[B, *S, C]` (ConvNeXt V2, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), keepdim=True)  # [B, 1, …, C]
        relative: Tensor = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        return x + self.weight * (x * relative) + self.bias


class ConvNeXtBlock(nn.Module):
    """The ConvNeXt V2 block for any rank: depthwise 7×7, LayerNorm, and an MLP with response normalisation."""

    def __init__(self, channels: int, rank: int = 2) -> None:
        super().__init__()
        self.depthwise = CONVOLUTIONS[rank](channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.response = ResponseNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, *S]` to `[B, C, *S]`."""
        out = self.norm(self.depthwise(x).movedim(1, -1))  # [B, *S, C]
        out = self.reduce(self.response(self.act(self.expand(out))))
        result: Tensor = x + out.movedim(-1, 1)
        return result


class FCMAEDecoder(nn.Module):
    """The decoder of ConvNeXt V2's masked autoencoder (Woo et al., 2023, arXiv:2301.00808, section 3.1).

    Projects the deepest map, puts a learned token at masked positions, runs one ConvNeXt block, and predicts the
    pixels of each position linearly.

    Args:
        width: channels of the block; 512 in the paper.
        channels_in: channels of the deepest map.
        stride: stride of the deepest map.
        channels: image channels.
        rank: number of spatial axes.
    """

    def __init__(self, width: int, channels_in: int, stride: int, channels: int = 3, rank: int = 2) -> None:
        super().__init__()
        if width <= 0:
            raise UserError(f"decoder_width {width} must be above 0; the paper's is 512")
        self.stride, self.rank = stride, rank
        self.project = CONVOLUTIONS[rank](channels_in, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, *(1,) * rank))
        self.block = ConvNeXtBlock(width, rank)
        self.head = CONVOLUTIONS[rank](width, channels * stride**rank, 1)

    def fill(self, x: PackedTensor) -> Tensor:
        """Packed `[B, channels_in, *(S / stride)]` to dense `[B, width, *(S / stride)]`, with tokens where hidden."""
        projected: PackedTensor = self.project(x)
        return unpack(projected, fill=self.mask_token)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The deepest map, filled, alone in a list, to an image `[B, C, *S]`."""
        (filled,) = maps
        x = self.head(self.block(filled))  # [B, C · stride^rank, *(S / stride)]
        patches = x.flatten(2).transpose(1, 2)  # [B, positions, C · stride^rank]
        return from_patches(patches, x.shape[2:], (self.stride,) * self.rank)
