"""The dense decoder, and the step from sparse maps to dense ones (paper, section 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sparkmim.sparse import PackedTensor, unpack

NormKind = Literal["batch", "layer", "none"]

_CONV: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d,
}  # fmt: skip
_BATCH_NORM: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d,
}  # fmt: skip


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, *S]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Densify(nn.Module):
    """Turns one sparse feature map into a dense one of the decoder's width.

    Normalises the visible positions, puts a learned token at the masked ones, and projects.

    Args:
        channels: channels `C` of the map.
        width: channels of the decoder at this stride.
        norm: kind of normalisation, that of the encoder.
        deepest: the deepest map projects position by position (not at all if the widths agree), the
            others with a 3×3 convolution.
        rank: number of spatial axes.
    """

    def __init__(self, channels: int, width: int, norm: NormKind, deepest: bool, rank: int = 2) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.norm = _BATCH_NORM[rank](channels)
        elif norm == "layer":
            self.norm = ChannelLayerNorm(channels, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, channels, *(1,) * rank))
        self.project: nn.Module = nn.Identity()
        if not deepest or channels != width:
            kernel = 1 if deepest else 3
            self.project = _CONV[rank](channels, width, kernel, padding=kernel // 2)

    def forward(self, x: PackedTensor) -> Tensor:
        """Packed `[B, C, *S]` to dense `[B, width, *S]`."""
        normed: PackedTensor = self.norm(x)
        dense: Tensor = self.project(unpack(normed, fill=self.mask_token))
        return dense


class DecoderBlock(nn.Module):
    """Doubles the resolution and halves the channels."""

    def __init__(self, channels: int, rank: int = 2) -> None:
        super().__init__()
        conv, norm = _CONV[rank], _BATCH_NORM[rank]
        self.upsample = _CONV_TRANSPOSE[rank](channels, channels, 4, stride=2, padding=1)
        self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = conv(channels, channels // 2, 3, padding=1, bias=False)
        self.norm2 = norm(channels // 2)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, c, *S]` to `[B, c / 2, *2S]`."""
        x = self.upsample(x)
        x = self.act(self.norm1(self.conv1(x)))
        out: Tensor = self.norm2(self.conv2(x))
        return out


class Decoder(nn.Module):
    """Rebuilds the image from densified maps: a light UNet-like decoder.

    Args:
        width: channels at the deepest map; halves with each block.
        strides: strides of the maps it is given, ascending.
        channels: image channels.
        rank: number of spatial axes.

    Raises:
        ValueError: if a stride is no power of two or the width does not halve that often.
    """

    def __init__(self, width: int, strides: Sequence[int], channels: int = 3, rank: int = 2) -> None:
        super().__init__()
        if any(stride & (stride - 1) for stride in strides):
            raise ValueError(f"the decoder doubles resolution step by step; strides {list(strides)} are no powers of 2")
        depth = int(math.log2(strides[-1]))
        if width <= 0 or width % 2**depth:
            near = max(1, round(width / 2**depth)) * 2**depth
            raise ValueError(
                f"decoder_width {width} must be a multiple of {2**depth} (halved {depth} times); use {near}"
            )
        self.strides = tuple(strides)
        self.blocks = nn.ModuleList(DecoderBlock(width // 2**i, rank) for i in range(depth))
        self.head = _CONV[rank](width // 2**depth, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps, shallow to deep, each of the width at its stride, to an image `[B, C, *S]`."""
        at_stride = dict(zip(self.strides, maps, strict=True))
        x = at_stride.pop(self.strides[-1])
        for i, block in enumerate(self.blocks):
            skip = at_stride.get(self.strides[-1] // 2**i)
            x = block(x if skip is None else x + skip)
        image: Tensor = self.head(x)
        return image


def initialise(module: nn.Module) -> None:
    """The paper's initialisation of everything but the encoder."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=0.02)
        elif isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, Densify):
            nn.init.trunc_normal_(part.mask_token, std=0.02, a=-0.02, b=0.02)
        if isinstance(getattr(part, "bias", None), nn.Parameter):
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
