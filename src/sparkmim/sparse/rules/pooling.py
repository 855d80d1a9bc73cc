"""Pooling. Windows see zeros at masked positions, and the operation's own padding beyond the border."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.gather import Geometry
from sparkmim.sparse.packed import (
    PackedTensor,
    PendingTensor,
    UnsupportedOperation,
    dense_shape,
    gather_patches,
    like,
    on_dense_map,
    register_rule,
    to_rows,
)
from sparkmim.sparse.rules.convolution import geometry_of, per_axis
from sparkmim.sparse.rules.reduction import over_samples
from sparkmim.sparse.windows import gather_windows

_MAX_POOLS: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(x: PackedTensor, geometry: Geometry, outside: float) -> Tensor:
    start, length = geometry.span
    if not any(start) and length == geometry.block:
        return x.values  # windows stay inside their patch
    return gather_windows(to_rows(x), x.patches, geometry.block, start, length, outside)


def _rank_of(func: Callable[..., Any], x: PackedTensor) -> int:
    """Spatial axes of the map, which must be those of the function."""
    rank = x.patches.rank
    if int(func.__name__[-2]) != rank:
        raise UnsupportedOperation(
            f"`{func.__name__}` of a masked map {list(dense_shape(x))}: it must have {rank} spatial axes, after the "
            "channels"
        )
    return rank


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
    geometry = geometry_of(func.__name__, x, kernel, steps, before, dilation, after, ceil_mode)
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
    """A window divides by what it would divide by without a mask."""
    if isinstance(x, PendingTensor):
        options = (stride, padding, ceil_mode, count_include_pad, *([divisor_override] if divisor_override else []))
        return on_dense_map(x, func.__name__, lambda dense: func(dense, kernel_size, *options))
    rank = _rank_of(func, x)
    kernel = per_axis(kernel_size, rank)
    steps = per_axis(stride, rank) if stride else kernel
    padding = per_axis(padding, rank)
    geometry = geometry_of(func.__name__, x, kernel, steps, padding, (1,) * rank, padding, ceil_mode)
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


@register_rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
)  # fmt: skip
def _adaptive_pool(
    func: Callable[..., Any],
    x: PackedTensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
) -> Tensor:
    """Global pooling: over the visible positions of each sample."""
    sizes = [output_size] if isinstance(output_size, int) or output_size is None else list(output_size)
    fits = x.axes == tuple(range(2, x.ndim)) and int(func.__name__[-2]) == len(x.axes)
    if any(size != 1 for size in sizes) or return_indices or not fits:
        raise UnsupportedOperation(
            f"`{func.__name__}` to {output_size}: only global pooling (output size 1) is defined on a masked map"
        )
    maximum = "max" in func.__name__
    pooled = over_samples(x, x, lambda sample: sample.amax(-1) if maximum else sample.mean(-1))
    out: Tensor = torch.cat(pooled)
    return out.reshape(*out.shape, *(1,) * len(x.axes))  # [B, C, 1, …]
