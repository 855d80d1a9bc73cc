"""Decoders from packed feature maps to images: SparK's hierarchical one, and the single block of FCMAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.models.fused import folded_upsampling, normalised_convolution
from sparkmim.sparse import PackedTensor, filled_convolution, unpack

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
    """Turns a packed feature map into a dense one of the decoder's width.

    Normalises the visible positions, puts a learned token at the masked ones, and projects.

    Args:
        channels: channels `C` of the map.
        width: channels of the decoder at this stride.
        norm: the encoder's kind of normalisation.
        deepest: whether this is the deepest map, projected by a 1×1 convolution, or not at all if the widths
            agree; the others are projected by a 3×3 convolution.
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
        self.project: nn.Identity | nn.Conv1d | nn.Conv2d | nn.Conv3d = nn.Identity()
        if not deepest or channels != width:
            kernel = 1 if deepest else 3
            self.project = _CONV[rank](channels, width, kernel, padding=kernel // 2)

    def forward(self, x: PackedTensor) -> Tensor:
        """Packed `[B, C, *S]` to dense `[B, width, *S]`."""
        normed: PackedTensor = self.norm(x)
        if isinstance(self.project, nn.Identity):
            return unpack(normed, fill=self.mask_token)
        return filled_convolution(normed, self.mask_token, self.project.weight, self.project.bias)


class DecoderBlock(nn.Module):
    """Multiplies the resolution and halves the channels.

    Args:
        channels: input channels `c`.
        rank: number of spatial axes.
        factor: upsampling factor `f`. The transposed convolution has kernel `f + 2 · (f // 2)`, stride `f` and
            padding `f // 2`; at 2 it is the paper's.
    """

    def __init__(self, channels: int, rank: int = 2, factor: int = 2) -> None:
        super().__init__()
        conv, norm = _CONV[rank], _BATCH_NORM[rank]
        overlap = factor // 2
        self.upsample = _CONV_TRANSPOSE[rank](channels, channels, factor + 2 * overlap, stride=factor, padding=overlap)
        self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = conv(channels, channels // 2, 3, padding=1, bias=False)
        self.norm2 = norm(channels // 2)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, c, *S]` to `[B, c / 2, *(factor · S)]`, the input of `norm2`."""
        if self.folds(x):
            x = folded_upsampling(x, self.upsample, self.conv1)
        else:
            x = self.conv1(self.upsample(x))
        return normalised_convolution(x, self.norm1, True, self.conv2)

    def folds(self, x: Tensor) -> bool:
        """Whether folding pays: it saves 4 products of channels per output position, and composes kernels of 144."""
        if type(self.upsample) is not nn.ConvTranspose2d or self.upsample.kernel_size != (4, 4):
            return False
        outputs = 4 * x.numel() / x.shape[1]
        return 4 * outputs > 2 * 324 * x.shape[1]


class Decoder(nn.Module):
    """Predicts the image from densified maps: a light UNet-like decoder (paper, section 3.3).

    One block per doubling of the resolution; where strides are not powers of two, one per prime factor.

    Args:
        width: channels at the deepest map, halved by each block.
        strides: strides of the maps, ascending, each a multiple of the one before.
        channels: image channels.
        rank: number of spatial axes.

    Raises:
        ValueError: if strides do not divide each other, or the width cannot be halved once per block.
    """

    def __init__(self, width: int, strides: Sequence[int], channels: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.strides = tuple(strides)
        factors = upsampling_factors(strides)
        depth = len(factors)
        if width <= 0 or width % 2**depth:
            near = max(1, round(width / 2**depth)) * 2**depth
            raise UserError(
                f"decoder_width {width} must be a multiple of {2**depth} (halved {depth} times); use {near}"
            )
        self.blocks = nn.ModuleList(DecoderBlock(width // 2**i, rank, factor) for i, factor in enumerate(factors))
        self.head = _CONV[rank](width // 2**depth, channels, 1)
        self.block_strides = tuple(strides[-1] // math.prod(factors[:i]) for i in range(depth))

    def width_at(self, stride: int) -> int:
        """Returns the channels of the map to add at a stride."""
        width: int = self.blocks[self.block_strides.index(stride)].upsample.in_channels  # type: ignore[union-attr, assignment]
        return width

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps `[B, width_at(s_i), *(S / s_i)]`, shallow to deep, to an image `[B, C, *S]`."""
        at_stride = dict(zip(self.strides, maps, strict=True))
        x, norm = at_stride.pop(self.strides[-1]), None
        for stride, block in zip(self.block_strides, self.blocks, strict=True):
            if norm is not None:
                x = norm(x)
            if stride in at_stride:
                x = x + at_stride[stride]
            x, norm = block(x), block.norm2
        return normalised_convolution(x, norm, False, self.head)


def upsampling_factors(strides: Sequence[int]) -> list[int]:
    """Returns the upsampling factor of each block, from the deepest map to the image.

    >>> upsampling_factors([4, 8, 16, 32])
    [2, 2, 2, 2, 2]
    >>> upsampling_factors([3, 12])
    [2, 2, 3]

    Raises:
        ValueError: if a stride does not divide the next one.
    """
    factors: list[int] = []
    for shallow, deep in reversed(list(zip((1, *strides), strides, strict=False))):
        if deep % shallow:
            raise UserError(
                f"the decoder cannot go from stride {deep} to stride {shallow}, which does not divide it; choose maps "
                "of other strides with feature_modules"
            )
        ratio, prime = deep // shallow, 2
        while ratio > 1:
            while ratio % prime == 0:
                factors.append(prime)
                ratio //= prime
            prime += 1
    return factors


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
        self.depthwise = _CONV[rank](channels, channels, 7, padding=3, groups=channels)
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
        self.project = _CONV[rank](channels_in, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, *(1,) * rank))
        self.block = ConvNeXtBlock(width, rank)
        self.head = _CONV[rank](width, channels * stride**rank, 1)

    def forward(self, maps: Sequence[PackedTensor]) -> Tensor:
        """Packed maps, of which only the deepest is used, to an image `[B, C, *S]`."""
        projected: PackedTensor = self.project(maps[-1])
        x = self.head(self.block(unpack(projected, fill=self.mask_token)))  # [B, C · stride^rank, *(S / stride)]
        patches = x.flatten(2).transpose(1, 2)  # [B, positions, C · stride^rank]
        return from_patches(patches, x.shape[2:], (self.stride,) * self.rank)


def initialise(module: nn.Module) -> None:
    """Initialises a decoder, or a list of `Densify`, as the paper does."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=0.02)
        elif isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, Densify | FCMAEDecoder):
            nn.init.trunc_normal_(part.mask_token, std=0.02, a=-0.02, b=0.02)
        if isinstance(getattr(part, "bias", None), nn.Parameter):
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]


def to_patches(images: Tensor, block: Sequence[int]) -> Tensor:
    """Cuts `[B, C, *S]` into `[B, patches, C · prod(block)]`."""
    rank = len(block)
    for axis, size in reversed(list(enumerate(block, start=2))):
        images = torch.unflatten(images, axis, (-1, size))  # [B, C, grid_1, block_1, …]
    grid_axes, block_axes = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return images.permute(0, *grid_axes, 1, *block_axes).flatten(1 + rank).flatten(1, rank)


def from_patches(patches: Tensor, grid: Sequence[int], block: Sequence[int]) -> Tensor:
    """Joins `[B, patches, C · prod(block)]` to `[B, C, *S]`."""
    rank = len(block)
    x = patches.view(patches.shape[0], *grid, -1, *block)  # [B, *grid, C, *block]
    order = [0, 1 + rank]
    for axis in range(rank):
        order += [1 + axis, 2 + rank + axis]
    x = x.permute(order)  # [B, C, grid_1, block_1, …]
    return x.reshape(*x.shape[:2], *(cells * size for cells, size in zip(grid, block, strict=True)))
