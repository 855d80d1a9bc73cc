"""Operations that move, split, join and index axes: they do to the mask what they do to the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.masked import MaskedTensor, define, is_constant, is_on_grid, masked_among

_SHAPES = """
    permute transpose swapaxes swapdims movedim moveaxis get:T get:mT t view reshape flatten unflatten view_as
    reshape_as ravel unsqueeze squeeze expand expand_as broadcast_to repeat repeat_interleave tile chunk split
    tensor_split split_with_sizes unsafe_chunk unsafe_split unbind select narrow index_select flip roll getitem unfold
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle gather take_along_dim rot90 diagonal
"""


@define(*_SHAPES.split())
def shape(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Does the same to mask and values; a view stays one."""
    out = func(x, *args, **kwargs)
    if not isinstance(x, MaskedTensor):  # shaped by a masked tensor's sizes
        return out
    masks = _shaped(func, x.mask, args, kwargs)
    grid_masks = _grid_mask_of(func, x, args, kwargs)
    if isinstance(out, Tensor):
        return MaskedTensor.of(out, masks, x.patches, grid_masks)
    grid_masks = [None] * len(out) if grid_masks is None else grid_masks
    return type(out)(
        MaskedTensor.of(part, mask, x.patches, grid_mask)
        for part, mask, grid_mask in zip(out, masks, grid_masks, strict=True)
    )


def _shaped(func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(mask.contiguous() if func.__name__.startswith(("view", "unflatten")) else mask, *args, **kwargs)


def _grid_mask_of(func: Callable[..., Any], x: MaskedTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what becomes of a grid mask, or is one after cropping a map; None where that cannot be said."""
    if x.grid_mask is not None:
        try:
            return _shaped(func, x.grid_mask, args, kwargs)
        except (IndexError, RuntimeError):  # sizes that were written out
            return None
    index = args[0] if func.__name__ == "__getitem__" and args and isinstance(args[0], tuple) else ()
    if index[:1] == (Ellipsis,):
        index = (*[slice(None)] * (x.ndim - len(index) + 1), *index[1:])
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
        return None
    cropped = [
        axis for axis, part in enumerate(index[2:], start=2) if part.indices(x.shape[axis])[:2] != (0, x.shape[axis])
    ]
    return x.mask[index[:2]] if cropped and is_on_grid(x) else None


@define("cat", "concat", "concatenate", "stack")
def _join(func: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    masked = masked_among(tensors)
    at = kwargs.pop("axis", dim)
    masks = [tensor.mask if isinstance(tensor, MaskedTensor) else _beside(masked[0], tensor, at) for tensor in tensors]
    grid_masks = [tensor.grid_mask for tensor in masked]
    off = None
    if func.__name__ != "stack" and len(masked) == len(tensors) and all(mask is not None for mask in grid_masks):
        off = func(grid_masks, at)
    return MaskedTensor.wrap(func(list(tensors), at, **kwargs), func(masks, at), masked[0].patches, off)


def _beside(x: MaskedTensor, other: Tensor, axis: int) -> Tensor:
    """Returns the mask of a dense tensor that is joined with `x`: hidden where `x` is, if that is so all along."""
    if x.ndim == other.ndim and is_constant(x.mask, axis % x.ndim):
        return x.mask.narrow(axis, 0, 1).expand(other.shape)
    return torch.ones_like(other, dtype=torch.bool)
