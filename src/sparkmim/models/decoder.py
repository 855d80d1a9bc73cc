"""SparK's hierarchical decoder, from packed feature maps to images.

Its operations come with less memory and work than PyTorch's modules would take, computing the same to rounding:
`normalised_convolution` keeps no activations for the backward pass, and `folded_upsampling` makes one convolution of a
transposed convolution and the convolution after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from sparkmim.errors import UserError
from sparkmim.models.checkpointing import checkpointed
from sparkmim.sparse import PackedTensor, filled_convolution, unpack
from sparkmim.sparse.gather import added, owner
from sparkmim.sparse.packed import as_autocast

aten = torch.ops.aten

NormKind = Literal["batch", "layer", "none"]

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d,
}  # fmt: skip
_BATCH_NORM: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d,
}  # fmt: skip


_CHUNK_BYTES = 16 * 2**20
"""Largest part of the normalised map that is held at a time: what the caches of a CPU hold."""


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
            self.project = CONVOLUTIONS[rank](channels, width, kernel, padding=kernel // 2)

    def forward(self, x: PackedTensor) -> Tensor:
        """Packed `[B, C, *S]` to dense `[B, width, *S]`."""
        normed: PackedTensor = self.norm(x)
        if isinstance(self.project, nn.Identity):
            return unpack(normed, fill=self.mask_token)
        return filled_convolution(normed, self.mask_token, self.project.weight, self.project.bias)


class DecoderBlock(nn.Module):
    """Multiplies the resolution and halves the channels, rounding down; what follows applies the last norm.

    Args:
        channels: input channels `c`.
        rank: number of spatial axes.
        factor: upsampling factor `f`. The transposed convolution has kernel `f + 2 · (f // 2)`, stride `f` and
            padding `f // 2`; at 2 it is the paper's.
    """

    def __init__(self, channels: int, rank: int = 2, factor: int = 2) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[rank], _BATCH_NORM[rank]
        overlap = factor // 2
        self.upsample = _CONV_TRANSPOSE[rank](channels, channels, factor + 2 * overlap, stride=factor, padding=overlap)
        self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = conv(channels, channels // 2, 3, padding=1, bias=False)
        self.norm2 = norm(channels // 2)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor, norm: nn.Module, densified: Tensor | None = None) -> Tensor:
        """`[B, c, *S]` to `[B, c // 2, *(factor · S)]`.

        Starts with `norm`, the last one of the block before, and ends before its own `norm2`: what is kept for the
        backward pass is the input of a norm. After `norm`, it adds a densified map.
        """
        x = norm(x)
        if densified is not None:
            x = x + densified
        if self.folds(x):
            x = folded_upsampling(x, self.upsample, self.conv1)  # type: ignore[arg-type]
        else:
            x = self.conv1(self.upsample(x))
        return normalised_convolution(x, self.norm1, self.act, self.conv2)

    def folds(self, x: Tensor) -> bool:
        """Whether to fold: it saves 4 products of channels per output position, but composes the kernels first.

        Measured on CPUs: faster where composing costs less than an eighth of what is saved.
        """
        if type(self.upsample) is not nn.ConvTranspose2d or self.upsample.kernel_size != (4, 4):
            return False
        channels, outputs = x.shape[1], 4 * x.numel() // x.shape[1]
        return x.device.type == "cpu" and not torch.compiler.is_compiling() and outputs > 650 * channels


class Decoder(nn.Module):
    """Predicts the image from densified maps: a light UNet-like decoder (paper, section 3.3).

    One block per doubling of the resolution; where strides are not powers of two, one per prime factor.

    Args:
        width: channels at the deepest map, halved by each block, rounding down.
        strides: strides of the maps, ascending, each a multiple of the one before.
        channels: image channels.
        rank: number of spatial axes.
        checkpoint_gradients: whether blocks keep their inputs alone for the backward pass.

    Raises:
        ValueError: if strides do not divide each other, or the width leaves no channel after the last block.
    """

    def __init__(
        self, width: int, strides: Sequence[int], channels: int = 3, rank: int = 2, checkpoint_gradients: bool = False
    ) -> None:
        super().__init__()
        self.checkpoint_gradients = checkpoint_gradients
        self.strides = tuple(strides)
        factors = upsampling_factors(strides)
        depth = len(factors)
        if width < 2**depth:
            least = 2**depth
            raise UserError(f"decoder_width {width}, halved {depth} times, leaves no channel; use {least} or more")
        self.blocks = nn.ModuleList(DecoderBlock(width // 2**i, rank, factor) for i, factor in enumerate(factors))
        self.head = CONVOLUTIONS[rank](width // 2**depth, channels, 1)
        self.block_strides = tuple(strides[-1] // math.prod(factors[:i]) for i in range(depth))

    def width_at(self, stride: int) -> int:
        """Returns the channels of the map to add at a stride."""
        width: int = self.blocks[self.block_strides.index(stride)].upsample.in_channels  # type: ignore[union-attr, assignment]
        return width

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps `[B, width_at(s_i), *(S / s_i)]`, shallow to deep, to an image `[B, C, *S]`."""
        at_stride = dict(zip(self.strides, maps, strict=True))
        x = at_stride.pop(self.strides[-1])
        norm: nn.Module = nn.Identity()
        for stride, block in zip(self.block_strides, self.blocks, strict=True):
            arguments = x, norm, at_stride.get(stride)
            x = checkpointed(block, *arguments) if self.checkpoint_gradients else block(*arguments)
            norm = block.norm2  # type: ignore[assignment]
        return normalised_convolution(x, norm, None, self.head)


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


class _NormalisedConvolution(torch.autograd.Function):
    """Batch norm with the batch's statistics, ReLU6 or nothing, and a convolution with stride 1.

    Keeps the input `x` `[B, C, *S]` and the statistics; what lies in between exists in parts, some samples at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, running: tuple[Tensor | None, Tensor | None],
        momentum: float, eps: float, relu6: bool, weight: Tensor, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mean, variance = aten.batch_norm_update_stats(x, *running, momentum)
        ctx.save_for_backward(x, scale, shift, mean, variance, weight)
        ctx.eps, ctx.relu6 = eps, relu6
        bias = None if bias is None else bias.to(x.dtype)
        parts = [
            aten.convolution(part, weight.to(x.dtype), bias, *_same_size(weight))
            for _, part in _normalised(x, scale, shift, mean, variance, eps, relu6)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, variance, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.needs_input_grad[7:]
        grad = torch.empty_like(x)
        grad_weight = grad_bias = None
        for part, normalised in _normalised(x, scale, shift, mean, variance, ctx.eps, ctx.relu6):
            of_input, weight_part, bias_part = aten.convolution_backward(
                grads[0][part], normalised, weight.to(x.dtype), [weight.shape[0]], *_same_size(weight),
                (True, of_weight, of_bias),
            )  # fmt: skip
            if ctx.relu6:
                aten.hardtanh_backward.grad_input(of_input, normalised, 0.0, 6.0, grad_input=of_input)
            grad[part] = of_input
            grad_weight = added(grad_weight, weight_part) if of_weight else None
            grad_bias = added(grad_bias, bias_part) if of_bias else None
        inverse = (variance + ctx.eps).rsqrt()
        grad_x, grad_scale, grad_shift = aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, inverse, True, ctx.eps, (True, True, True)
        )
        return grad_x, grad_scale, grad_shift, None, None, None, None, grad_weight, grad_bias


def _same_size(weight: Tensor) -> tuple[Any, ...]:
    """Returns the arguments of PyTorch's convolutions, after the tensors, for outputs of the inputs' size."""
    kernel = weight.shape[2:]
    padding = [size // 2 for size in kernel]
    return [1] * len(kernel), padding, [1] * len(kernel), False, [0] * len(kernel), 1


def _normalised(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float, relu6: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yields samples and their normalised, activated maps."""
    size = max(1, _CHUNK_BYTES // max(1, x[0].numel() * x.element_size()))
    for start in range(0, x.shape[0], size):
        part = slice(start, start + size)
        normalised = F.batch_norm(x[part], mean, variance, scale, shift, False, 0.0, eps)
        yield part, normalised.clamp_(0, 6) if relu6 else normalised


def normalised_convolution(
    x: Tensor, norm: nn.Module, activation: nn.ReLU6 | None, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d
) -> Tensor:
    """Computes `convolution(activation(norm(x)))`, without keeping what lies in between for the backward pass.

    Other norms than PyTorch's batch norm in training, such as SyncBatchNorm, keep it.

    Args:
        x: `[B, C, *S]`.
        norm: norm of `C` channels.
        activation: what follows the norm, if anything.
        convolution: has stride 1 and pads to the same size.
    """
    out: Tensor
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and norm.training
    if not plain or torch.compiler.is_compiling():
        normed = norm(x)
        out = convolution(normed if activation is None else activation(normed))
        return out
    assert isinstance(norm, _BatchNorm)
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch norm in training needs more than one value per channel, not a map {list(x.shape)}")
    momentum = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    x = as_autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        out = _NormalisedConvolution.apply(
            x, norm.weight, norm.bias, (norm.running_mean, norm.running_var), momentum, norm.eps,
            activation is not None, convolution.weight, convolution.bias,
        )  # fmt: skip
        return out


class _Phases(torch.autograd.Function):
    """Convolves `[B, C, H, W]` by a weight `[4 · out, C, 3, 3]`, and shuffles to `[B, out, 2H, 2W]`.

    Also returns the first and last row of the input, and the first and last column, so that what they are used for
    adds its gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        phases = aten.convolution(x, weight, bias, *_same_size(weight))
        batch, four, height, width = phases.shape
        by_parity = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, four // 4)
        shuffled = by_parity.transpose(2, 3).reshape(batch, 2 * height, 2 * width, four // 4)
        # A view must not be returned, or the borders could not be changed in place: channels stay last.
        return owner(shuffled), *(border.clone() for border in _borders(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        batch, height, width, out = grads[0].shape
        by_parity = grads[0].view(batch, height // 2, 2, width // 2, 2, out).transpose(2, 3)
        phases = by_parity.reshape(batch, height // 2, width // 2, 4 * out).permute(0, 3, 1, 2)
        grad, grad_weight, grad_bias = aten.convolution_backward(
            phases, x, weight, [4 * out], *_same_size(weight), (True, *ctx.needs_input_grad[1:])
        )
        for border, part in zip(_borders(grad), grads[1:], strict=True):
            border.add_(part)
        return grad, grad_weight, grad_bias


class _SubtractBorders(torch.autograd.Function):
    """Subtracts strips `[B, C, 1, W]` and `[B, C, H, 1]` from the borders of a map `[B, H, W, C]`, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *strips: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        for border, strip in zip(_borders(x.movedim(-1, 1)), strips, strict=True):
            border.sub_(strip)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(-border for border in _borders(grads[0].movedim(-1, 1)))


def _borders(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns views of the first and last row of `[B, C, H, W]`, and of the first and last column."""
    return x[:, :, :1], x[:, :, -1:], x[:, :, :, :1], x[:, :, :, -1:]


def folded_upsampling(x: Tensor, upsample: nn.ConvTranspose2d, convolution: nn.Conv2d) -> Tensor:
    """Computes `convolution(upsample(x))` as one 3×3 convolution of `x` to four times the channels.

    Output position `2i + a` reads the input at `i + d` for `d` in -1, 0, 1, so that each parity `a` has a 3×3 kernel
    of its own: 9 products of channels per output instead of 4 and 9, and the upsampled map is never there. The
    convolution pads the upsampled map with zeros, where the folded kernel goes on beyond it: this is subtracted.

    Args:
        x: `[B, C, H, W]`.
        upsample: kernel 4, stride 2, padding 1.
        convolution: kernel 3, padding 1, without bias.

    Returns:
        `[B, out, 2H, 2W]`.
    """
    up, offset, weight = upsample.weight, upsample.bias, convolution.weight
    out = weight.shape[0]
    x = as_autocast(x)
    with torch.autocast(x.device.type, enabled=False):  # the folded weight is rounded once
        both = F.conv2d(up, weight, padding=2)  # [C, out, 6, 6]; tap u of output q reads input (q + 2 - u) / 2
        folded = both.view(-1, out, 3, 2, 3, 2).flip(2, 4)  # [C, out, d, a, e, b]
        folded = folded.permute(3, 5, 1, 0, 2, 4).reshape(4 * out, -1, 3, 3)  # [a · b · out, C, d, e]
        bias = None if offset is None else (weight.sum((2, 3)) @ offset).repeat(4)
        folded = folded.to(x.dtype, memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(x.dtype)
        z, top, bottom, left, right = _Phases.apply(x, folded, bias)

    def beyond(strip: Tensor, kernel: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv_transpose2d(strip, kernel, offset, stride, padding)

    # The upsampled rows -1 and 2H, with their ends beyond the map, and columns -1 and 2W, without.
    strips = (
        F.conv2d(beyond(top, up[:, :, :1], (1, 2), (0, 0)), weight[:, :, :1]),
        F.conv2d(beyond(bottom, up[:, :, 3:], (1, 2), (0, 0)), weight[:, :, 2:]),
        F.conv2d(beyond(left, up[:, :, :, :1], (2, 1), (1, 0)), weight[:, :, :, :1], padding=(1, 0)),
        F.conv2d(beyond(right, up[:, :, :, 3:], (2, 1), (1, 0)), weight[:, :, :, 2:], padding=(1, 0)),
    )
    result: Tensor = _SubtractBorders.apply(z, *strips)
    return result.movedim(-1, 1)


def initialise(module: nn.Module) -> None:
    """Initialises a decoder, or a list of `Densify`, as the paper does."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=0.02)
        elif isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(getattr(part, "mask_token", None), nn.Parameter):
            nn.init.trunc_normal_(part.mask_token, std=0.02, a=-0.02, b=0.02)  # type: ignore[arg-type]
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
