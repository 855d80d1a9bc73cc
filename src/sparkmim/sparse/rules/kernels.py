"""Operations with a kernel: convolution and pooling. Their windows see zeros at masked positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.gather import Geometry, gather_convolution, multiply_rows
from sparkmim.sparse.packed import (
    PackedTensor,
    PendingTensor,
    UnsupportedOperation,
    as_autocast,
    block_of,
    dense_shape,
    from_rows,
    gather_patches,
    like,
    on_dense_map,
    register_rule,
    to_rows,
)
from sparkmim.sparse.windows import gather_windows, image_convolution

_FEW_CHANNELS = 8
"""Up to this many input channels, the dense kernel beats the gather: rows are too short."""

_MAX_POOLS: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Repeats a single value for every axis: `3` or `(3,)` to `(3, 3)`."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _geometry(
    name: str,
    x: PackedTensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    after: Sequence[int],
    ceil_mode: bool = False,
) -> Geometry:
    """Returns the geometry of an operation, after checking that it maps patches to patches.

    Raises:
        UnsupportedOperation: if the output size is not the input size divided by the stride, or the stride does not
            divide a patch.
    """
    rank, block = x.patches.rank, block_of(x)
    if x.axes != tuple(range(2, 2 + rank)) or x.ndim != 2 + rank:
        raise UnsupportedOperation(
            f"`{name}` of a masked map {list(dense_shape(x))}: it must have {rank} spatial axes, after the channels"
        )
    sizes = dense_shape(x)[2:]
    for size, extent, k, s, p, q, d in zip(sizes, block, kernel, stride, padding, after, dilation, strict=True):
        if extent % s:
            raise UnsupportedOperation(
                f"`{name}` has stride {s}, which does not divide the {extent} position(s) that a patch has here; "
                "use a patch size that is a multiple of the network's total stride"
            )
        span = size + p + q - d * (k - 1) - 1
        out = (span + s - 1) // s + 1 if ceil_mode else span // s + 1
        if ceil_mode and (out - 1) * s >= size + p:
            out -= 1
        if out != size // s:
            raise UnsupportedOperation(
                f"`{name}` with kernel {k}, stride {s}, padding {p} and dilation {d} turns {size} positions into "
                f"{out}, not {size // s}: patches of input and output no longer correspond. Pad it by "
                f"{max(0, (d * (k - 1) + 1 - s + 1) // 2)}"
            )
    return Geometry(block, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


@register_rule("conv1d", "conv2d", "conv3d", pending=True)
def _convolution(
    func: Callable[..., Any],
    x: PackedTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    rank = x.patches.rank
    name = func.__name__
    if isinstance(x, PendingTensor) and x.folded is not None:
        return _convolve_each(func, x, weight, bias, (stride, padding, dilation), groups)
    if int(name[4]) != rank:
        raise UnsupportedOperation(f"`{name}` of a masked map {list(dense_shape(x))}, which has {rank} spatial axes")
    kernel, stride, dilation = tuple(weight.shape[2:]), per_axis(stride, rank), per_axis(dilation, rank)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        before = tuple(size // 2 if padding == "same" else 0 for size in total)
        after = tuple(size - size // 2 if padding == "same" else 0 for size in total)
    else:
        before = after = per_axis(padding, rank)
    if isinstance(x, PendingTensor):
        if not x.extends_by(0.0):
            return on_dense_map(x, name, lambda dense: func(dense, weight, bias, stride, padding, dilation, groups))
        before = tuple(size + extra for size, (extra, _) in zip(before, x.border, strict=True))
        after = tuple(size + extra for size, (_, extra) in zip(after, x.border, strict=True))
        x = x.settled()
    geometry = _geometry(name, x, kernel, stride, before, dilation, after)
    x = like(x, as_autocast(x))
    bias = None if bias is None else bias.to(x.dtype)
    patches = x.patches
    with torch.autocast(x.device.type, enabled=False):
        if groups == 1 and math.prod(kernel) == 1 and not any(geometry.padding):
            # Channels last while taking every other position, or the gradient would come in another memory format.
            taken = x.movedim(1, -1)[(slice(None), *(slice(None, None, step) for step in stride))]
            rows = multiply_rows(taken.flatten(0, -2), weight.flatten(1).to(x.dtype), bias)
        elif groups == 1 and (weight.shape[1] > _FEW_CHANNELS or _local(geometry)):
            rows = gather_convolution(to_rows(x), weight, patches, geometry, bias)
        else:
            rows = image_convolution(to_rows(x), weight, patches, geometry, groups, bias)
    return like(x, from_rows(rows, patches.num_visible, geometry.out_block))


def _convolve_each(
    func: Callable[..., Any],
    x: PendingTensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, Any, Any],
    groups: int,
) -> Tensor:
    """Convolves each sample by its own weights: `[1, B · C, *S]` by `[B · out, C / groups, *kernel]`."""
    samples, (stride, padding, dilation) = x.patches.batch_size, settings
    if x.folded != 1 or groups % samples or weight.shape[0] % samples:
        raise UnsupportedOperation(
            f"`{func.__name__}` of a batch folded into the channels needs groups for each sample"
        )
    stored = torch.split(x.settled(unfold=True), list(x.patches.counts))
    weights = weight.chunk(samples)
    biases = [None] * samples if bias is None else bias.chunk(samples)
    parts = []
    for values, patches, own, offset in zip(stored, x.patches.samples, weights, biases, strict=True):
        sample = PendingTensor.of(PackedTensor.wrap(values, patches, x.axes), x.border, x.border_mode, x.border_value)
        parts.append(_convolution(func, sample, own, offset, stride, padding, dilation, groups // samples))
    return PendingTensor.of(PackedTensor.wrap(torch.cat(parts), x.patches, x.axes), folded=1)


def _local(geometry: Geometry) -> bool:
    """Whether windows tile the patch without overlap."""
    return geometry.kernel == geometry.stride and not any(geometry.padding) and set(geometry.dilation) == {1}


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", pending=True)
def _transposed_convolution(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    return on_dense_map(x, func.__name__, lambda dense: func(dense, *args, **kwargs))


def _rank_of(func: Callable[..., Any], x: PackedTensor) -> int:
    """Returns the number of spatial axes of the map, checked against the function's name."""
    rank = x.patches.rank
    if int(func.__name__[-2]) != rank:
        raise UnsupportedOperation(
            f"`{func.__name__}` of a masked map {list(dense_shape(x))}: it must have {rank} spatial axes, after the "
            "channels"
        )
    return rank


def _windows(x: PackedTensor, geometry: Geometry, outside: float) -> Tensor:
    start, length = geometry.span
    if not any(start) and length == geometry.block:
        return x.values  # windows stay inside their patch
    return gather_windows(to_rows(x), x.patches, geometry.block, start, length, outside)


@register_rule("max_pool1d", "max_pool2d", "max_pool3d", pending=True)
def _max_pool(
    func: Callable[..., Any],
    x: PackedTensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices:
        raise UnsupportedOperation(f"`{func.__name__}` with return_indices: positions in a masked map have no rule")
    rank = _rank_of(func, x)
    kernel = per_axis(kernel_size, rank)
    steps = per_axis(stride, rank) if stride else kernel
    before, dilation = per_axis(padding, rank), per_axis(dilation, rank)
    after, outside = before, -math.inf
    if isinstance(x, PendingTensor):
        if any(before) or ceil_mode or not x.extends_by(x.border_value):
            return on_dense_map(
                x, func.__name__, lambda dense: func(dense, kernel_size, stride, padding, dilation, ceil_mode)
            )
        before, after = (tuple(sizes) for sizes in zip(*x.border, strict=True))
        outside, x = x.border_value, x.settled()
    geometry = _geometry(func.__name__, x, kernel, steps, before, dilation, after, ceil_mode)
    windows = _windows(x, geometry, outside)
    return like(x, _MAX_POOLS[rank](windows, kernel, steps, 0, dilation))


@register_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", pending=True)
def _avg_pool(
    func: Callable[..., Any],
    x: PackedTensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling, with the divisors of dense pooling."""
    if isinstance(x, PendingTensor):
        options = (stride, padding, ceil_mode, count_include_pad, *([divisor_override] if divisor_override else []))
        return on_dense_map(x, func.__name__, lambda dense: func(dense, kernel_size, *options))
    rank = _rank_of(func, x)
    kernel = per_axis(kernel_size, rank)
    steps = per_axis(stride, rank) if stride else kernel
    padding = per_axis(padding, rank)
    geometry = _geometry(func.__name__, x, kernel, steps, padding, (1,) * rank, padding, ceil_mode)
    means = _AVG_POOLS[rank](_windows(x, geometry, outside=0.0), kernel, steps)
    if divisor_override:
        return like(x, means * (math.prod(kernel) / divisor_override))
    # Windows at the border divide by fewer positions. Counted on the CPU, so that nothing waits for a GPU.
    scales: list[list[float]] = []
    for extent, size, step, before in zip(dense_shape(x)[2:], kernel, steps, padding, strict=True):
        starts = range(-before, extent - before, step)
        low, high = (-before, extent + before) if count_include_pad else (0, extent)
        scales.append([size / (min(start + size, high) - max(start, low)) for start in starts])
    if all(ratio == 1 for axis in scales for ratio in axis):
        return like(x, means)
    scale = torch.ones((), dtype=torch.float64, device="cpu")
    for axis in scales:
        scale = scale[..., None] * torch.tensor(axis, dtype=torch.float64, device="cpu")
    scale = scale.to(x.device, x.dtype, non_blocking=True).expand(x.patches.batch_size, 1, *scale.shape)  # [B, 1, *S]
    return like(x, means * gather_patches(scale, x.patches))
