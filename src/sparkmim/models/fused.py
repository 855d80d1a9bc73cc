"""The decoder's operations with less memory and work: the same functions, to rounding.

- `normalised_convolution`: batch norm, activation and convolution. The activation is not kept for the backward pass,
  which computes it again.
- `folded_upsampling`: a transposed convolution and the 3×3 convolution after it, as one at the low resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from sparkmim.sparse import added

aten = torch.ops.aten

_CHUNK_BYTES = 16 * 2**20
"""Largest part of the normalised map that is held at a time: what the caches of a CPU hold."""


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
        padding = [size // 2 for size in weight.shape[2:]]
        parts = [
            aten.convolution(part, weight.to(x.dtype), bias, [1] * len(padding), padding, [1] * len(padding), False,
                             [0] * len(padding), 1)
            for _, part in _normalised(x, scale, shift, mean, variance, eps, relu6)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, variance, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.needs_input_grad[7:]
        padding = [size // 2 for size in weight.shape[2:]]
        grad = torch.empty_like(x)
        grad_weight = grad_bias = None
        for part, normalised in _normalised(x, scale, shift, mean, variance, ctx.eps, ctx.relu6):
            of_input, weight_part, bias_part = aten.convolution_backward(
                grads[0][part], normalised, weight.to(x.dtype), [weight.shape[0]], [1] * len(padding), padding,
                [1] * len(padding), False, [0] * len(padding), 1, (True, of_weight, of_bias),
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
    x: Tensor, norm: nn.Module, relu6: bool, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d
) -> Tensor:
    """Computes `convolution(relu6(norm(x)))`, without keeping what lies in between for the backward pass.

    Other norms than PyTorch's batch norm in training, such as SyncBatchNorm, keep it.

    Args:
        x: `[B, C, *S]`.
        norm: norm of `C` channels.
        relu6: whether ReLU6 follows the norm.
        convolution: has stride 1 and pads to the same size.
    """
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and norm.training
    if not plain or torch.compiler.is_compiling():
        normed = norm(x)
        return convolution(F.relu6(normed, inplace=True) if relu6 else normed)  # type: ignore[no-any-return]
    assert isinstance(norm, _BatchNorm)
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch norm in training needs more than one value per channel, not a map {list(x.shape)}")
    momentum = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        out: Tensor = _NormalisedConvolution.apply(
            x, norm.weight, norm.bias, (norm.running_mean, norm.running_var), momentum, norm.eps, relu6,
            convolution.weight, convolution.bias,
        )  # fmt: skip
    return out


class _SubtractBorders(torch.autograd.Function):
    """Subtracts strips from the outermost rows and columns of a map `[B, C, H, W]`, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        for border, strip in zip(_borders(x), (top, bottom, left, right), strict=True):
            border.sub_(strip)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(-border for border in _borders(grads[0]))


def _borders(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns views of the first and last row, and of the first and last column."""
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
    device = x.device.type
    up, offset, weight = upsample.weight, upsample.bias, convolution.weight
    out = weight.shape[0]
    with torch.autocast(device, enabled=False):  # the folded weight is rounded once
        both = F.conv2d(up, weight, padding=2)  # [C, out, 6, 6]; tap u of output q reads input (q + 2 - u) / 2
        folded = both.view(-1, out, 3, 2, 3, 2).flip(2, 4)  # [C, out, d, a, e, b]
        folded = folded.permute(3, 5, 1, 0, 2, 4).reshape(4 * out, -1, 3, 3)  # [a · b · out, C, d, e]
        bias = None if offset is None else (weight.sum((2, 3)) @ offset).repeat(4)
    phases = F.conv2d(x, folded.contiguous(memory_format=torch.channels_last), bias, padding=1)
    batch, _, height, width = phases.shape
    z = phases.permute(0, 2, 3, 1).view(batch, height, width, 2, 2, out).transpose(2, 3)  # [B, H, 2, W, 2, out]
    z = z.reshape(batch, 2 * height, 2 * width, out).permute(0, 3, 1, 2)

    def beyond(strip: Tensor, kernel: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv_transpose2d(strip, kernel, offset, stride, padding)

    # The upsampled rows -1 and 2H, with their ends beyond the map, and columns -1 and 2W, without.
    strips = (
        F.conv2d(beyond(x[:, :, :1], up[:, :, :1], (1, 2), (0, 0)), weight[:, :, :1]),
        F.conv2d(beyond(x[:, :, -1:], up[:, :, 3:], (1, 2), (0, 0)), weight[:, :, 2:]),
        F.conv2d(beyond(x[:, :, :, :1], up[:, :, :, :1], (2, 1), (1, 0)), weight[:, :, :, :1], padding=(1, 0)),
        F.conv2d(beyond(x[:, :, :, -1:], up[:, :, :, 3:], (2, 1), (1, 0)), weight[:, :, :, 2:], padding=(1, 0)),
    )
    result: Tensor = _SubtractBorders.apply(z, *strips)
    return result
