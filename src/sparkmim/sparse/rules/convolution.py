"""Convolutions and linear maps over channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.gather import Geometry, gather_convolution, multiply_rows
from sparkmim.sparse.packed import (
    PackedTensor,
    PendingTensor,
    UnsupportedOperation,
    block_of,
    dense_shape,
    from_rows,
    like,
    on_dense_map,
    register_rule,
    to_rows,
)
from sparkmim.sparse.rules.reduction import sum_by_sample
from sparkmim.sparse.windows import image_convolution

_FEW_CHANNELS = 8
"""Up to this many input channels, rows are too short to gather: windows of the map go to the dense kernel."""


def per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`3` or `(3,)` to `(3, 3)`."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def geometry_of(
    name: str,
    x: PackedTensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    after: Sequence[int],
    ceil_mode: bool = False,
) -> Geometry:
    """Checks that an operation maps patches to patches, and describes how its window slides.

    Raises:
        UnsupportedOperation: if its output is not the input's size divided by the stride, or if a patch
            does not divide by the stride.
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
    geometry = geometry_of(name, x, kernel, stride, before, dilation, after)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = like(x, x.to(torch.get_autocast_dtype(x.device.type)))  # the gather is beyond autocast's sight
    bias = None if bias is None else bias.to(x.dtype)
    patches = x.patches
    with torch.autocast(x.device.type, enabled=False):
        if groups == 1 and math.prod(kernel) == 1 and not any(geometry.padding):
            strided = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
            rows = multiply_rows(to_rows(x[strided]), weight.flatten(1).to(x.dtype), bias)
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
    """Every sample by weights of its own: `[1, B · C, *S]` by `[B · out, C / groups, *kernel]`, in `B · groups`."""
    samples, (stride, padding, dilation) = x.patches.batch_size, settings
    if x.folded != 1 or groups % samples or weight.shape[0] % samples:
        raise UnsupportedOperation(
            f"`{func.__name__}` of a batch folded into the channels wants groups for each sample"
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
    """Whether windows do not overlap and stay inside their patch."""
    return geometry.kernel == geometry.stride and not any(geometry.padding) and set(geometry.dilation) == {1}


@register_rule("linear")
def _linear(func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(x, PackedTensor) or x.ndim - 1 in x.axes or weight.ndim != 2:
        raise UnsupportedOperation("`linear` needs channels last in a masked map, and a dense weight")
    rows = multiply_rows(x.reshape(-1, x.shape[-1]), weight, bias)
    return like(x, rows.view(*x.shape[:-1], -1))


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", pending=True)
def _transposed_convolution(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    return on_dense_map(x, func.__name__, lambda dense: func(dense, *args, **kwargs))


@register_rule("matmul", "rmatmul")
def _matmul(func: Callable[..., Any], x: Tensor, other: Tensor) -> Tensor:
    """Over channels, with one matrix for all or one per sample; or over all visible positions of each sample."""
    if func.__name__ == "__rmatmul__":
        x, other = other, x
    left, right = (part if isinstance(part, PackedTensor) else None for part in (x, other))
    if left is not None and right is not None:
        over_positions = left.axes == (left.ndim - 1,) and right.axes == (right.ndim - 2,) and left.flat == right.flat
        if over_positions and left.ndim == right.ndim and left.patches is right.patches:
            return sum_by_sample(torch.matmul(left, right), left.patches)
    elif left is not None and left.ndim - 1 not in left.axes:
        if other.ndim == 2:
            return like(left, torch.matmul(left, other))
        if left.axes == (left.ndim - 2,) and _one_per_sample(other, left):
            return like(left, torch.matmul(left, _for_patches(other, left)))
    elif right is not None and right.axes == (right.ndim - 1,) and _one_per_sample(x, right):
        return like(right, torch.matmul(_for_patches(x, right), right))
    raise UnsupportedOperation(
        "`matmul` of masked maps is defined over channels, or over all positions of flattened maps; this one compares "
        "positions with each other, as attention does"
    )


def _one_per_sample(matrices: Tensor, x: PackedTensor) -> bool:
    return matrices.ndim == x.ndim and matrices.shape[0] in (1, x.patches.batch_size)


def _for_patches(matrices: Tensor, x: PackedTensor) -> Tensor:
    """One matrix per sample to one per patch."""
    return matrices if matrices.shape[0] == 1 else matrices.index_select(0, x.patches.sample)
