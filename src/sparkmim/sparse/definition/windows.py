"""Convolution, pooling, resampling and padding: windows see zeros where the map is hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.masked import MaskedTensor, blocks_of, define, is_constant, is_on_grid, mask_map
from sparkmim.sparse.packed import UnsupportedOperation
from sparkmim.sparse.rules.kernels import per_axis


def _in_windows(x: MaskedTensor, out: Tensor, stride: Sequence[float], groups: int = 1) -> MaskedTensor:
    """Masks a map `[N, D, *S]` that windows made of `x`, `[N, C, *S]`.

    Args:
        stride: input positions for one of the output, per axis; below 1 where the map gets finer.
        groups: of channels that depend on each other alone.
    """
    if (mask := _patch_mask(x)) is None:
        mask = x.mask if x.grid_mask is None else x.grid_mask
    by_group = torch.unflatten(mask, 1, (groups, -1))  # [N, groups, C / groups, *S]
    if not is_constant(by_group, 2):
        raise UnsupportedOperation("windows over a map of which each channel is hidden elsewhere")
    mask = by_group[:, :, :1].expand(-1, -1, out.shape[1] // groups, *(-1,) * (mask.ndim - 2)).flatten(1, 2)
    if bool(mask.all()):
        return MaskedTensor.wrap(out, mask.new_ones(()), x.patches)
    for axis, step in enumerate(stride, start=2):
        mask = _at_stride(mask, axis, step)
    if mask.shape == out.shape:
        return MaskedTensor.wrap(out, mask, x.patches)
    return MaskedTensor.wrap(out, mask.new_ones(()), x.patches, mask)


def _patch_mask(x: MaskedTensor) -> Tensor | None:
    """Returns the patch mask of a map `[B, C, *S]`, `[B, C, *S]`, of which more may be hidden; None for others."""
    block = blocks_of(x, x.patches) if x.grid_mask is None else None
    if block is None:
        return None
    mask = x.patches.upsampled(block).unsqueeze(1)
    return mask.expand(x.shape) if bool((x.mask <= mask).all()) else None


def _at_stride(mask: Tensor, axis: int, step: float) -> Tensor:
    if step < 1:
        finer = round(1 / step)
        if abs(finer * step - 1) > 1e-9:
            raise UnsupportedOperation(f"a map is resized by {1 / step:g}, which moves patches off their grid")
        return mask.repeat_interleave(finer, axis)
    coarser = round(step)
    cells = torch.unflatten(mask, axis, (-1, coarser)) if mask.shape[axis] % coarser == 0 else None
    if cells is None or coarser != step or not is_constant(cells, axis + 1):
        raise UnsupportedOperation(
            f"a stride of {step:g} does not divide the patches; use a patch size that is a multiple of the network's "
            "total stride"
        )
    return cells.select(axis + 1, 0)


@define("conv1d", "conv2d", "conv3d")
def _convolution(
    func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    if not isinstance(x, MaskedTensor) or isinstance(weight, MaskedTensor):
        raise UnsupportedOperation(f"`{func.__name__}` by a masked kernel")
    out = func(x, weight, bias, stride, padding, dilation, groups)
    return _in_windows(x, out, per_axis(stride, out.ndim - 2), groups)


@define("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(
    func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    if not isinstance(x, MaskedTensor) or isinstance(weight, MaskedTensor):
        raise UnsupportedOperation(f"`{func.__name__}` by a masked kernel")
    out = func(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _in_windows(x, out, [1 / step for step in per_axis(stride, out.ndim - 2)], groups)


@define("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d")
def _pool(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Any:
    at = 1 if func.__name__.startswith("lp") else 0
    kernel: Any = kwargs.get("kernel_size", args[at] if len(args) > at else None)
    stride: Any = kwargs.get("stride", args[at + 1] if len(args) > at + 1 else None)
    out = func(x, *args, **kwargs)
    if not isinstance(out, Tensor):
        raise UnsupportedOperation(f"`{func.__name__}` with positions has no rule")
    return _in_windows(x, out, per_axis(stride if stride not in (None, [], ()) else kernel, out.ndim - 2), x.shape[1])


@define("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    out = func(x.contiguous(), *args, **kwargs)  # with `antialias`, the memory format of narrow maps matters
    if is_on_grid(x) and blocks_of(out, x.patches):
        return mask_map(out, x.patches)
    raise UnsupportedOperation(
        f"`{func.__name__}` of a masked map {list(x.shape)} to {list(out.shape)}, which the grid of "
        f"{'×'.join(map(str, x.patches.grid))} patches does not divide"
    )


@define("pad")
def _pad(
    func: Callable[..., Any], x: MaskedTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """The border of a map is visible."""
    out = func(x, pad, mode, value)
    mask, grid_mask = x.mask, x.grid_mask
    for axis, before, after in zip(reversed(range(x.ndim)), pad[::2], pad[1::2], strict=False):
        if before == after == 0:
            continue
        if axis < 2 and is_constant(mask, axis):  # as in convolutions, the batch or the channels
            mask = mask.narrow(axis, 0, 1).expand(*mask.shape[:axis], out.shape[axis], *mask.shape[axis + 1 :])
            continue
        grid_mask = x.mask if grid_mask is None and x.ndim > 2 else grid_mask
        mask = F.pad(mask, [0] * (2 * (x.ndim - 1 - axis)) + [before, after], value=True)
    return MaskedTensor.wrap(out, mask, x.patches, grid_mask)


@define("im2col")
def _im2col(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    hidden = func((~x.mask).to(x.dtype), *args, **kwargs)  # what lies beyond the border is visible
    return MaskedTensor.wrap(func(x, *args, **kwargs), hidden < 0.5, x.patches)
