"""Operations that move, split, join and index axes, except those that cut the batch or the map."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.packed import (
    PackedTensor,
    PendingTensor,
    UnsupportedOperation,
    block_of,
    dense_shape,
    like,
    register_rule,
)
from sparkmim.sparse.rules.pointwise import align


def _sizes(args: tuple[Any, ...]) -> list[int]:
    """Returns sizes given as `f(2, 3)` or `f((2, 3))`."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], Sequence | torch.Size) else list(args)


def _refuse(func: Callable[..., Any], x: PackedTensor, what: str) -> UnsupportedOperation:
    return UnsupportedOperation(f"`{func.__name__}` of a masked map {list(dense_shape(x))} {what}")


@register_rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "get:T", "get:mT", "t", pending=True
)
def _permute(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    _refuse_in_place(func, x)
    # A twin with a different size on each axis shows where every axis goes, however the call is written.
    twin = func(torch.empty(tuple(range(2, 2 + x.ndim)), device="meta"), *args, **kwargs)
    order = [size - 2 for size in twin.shape]
    if isinstance(x, PendingTensor):
        if x.folded is None or not x.bare or order != [1, 0, *range(2, x.ndim)]:
            raise _refuse_pending(func)
        return PendingTensor.of(x, folded=1 - x.folded)
    if order[0] != 0:
        raise _refuse(func, x, "moves the batch axis, which must stay first")
    return like(x, func(x, *args, **kwargs), tuple(order.index(axis) for axis in x.axes))


def _refuse_in_place(func: Callable[..., Any], x: PackedTensor) -> None:
    if func.__name__.endswith("_") and not func.__name__.startswith("__"):
        raise _refuse(func, x, "in place has no rule; use the function that returns the result")


def _refuse_pending(func: Callable[..., Any]) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"`{func.__name__}` of a masked map that was padded: a convolution or pooling must follow the padding directly"
    )


@register_rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", pending=True)
def _reshape(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    before = list(dense_shape(x))
    if func.__name__ in ("view_as", "reshape_as"):
        other = args[0]
        after = list(dense_shape(other) if isinstance(other, PackedTensor) else other.shape)
    elif func.__name__ == "view" and args and isinstance(args[0], torch.dtype):
        raise _refuse(func, x, "as another type has no rule")
    elif func.__name__ in ("view", "reshape"):
        after = _sizes(args) if args else list(kwargs.get("shape", kwargs.get("size", ())))
        if -1 in after:
            known = -math.prod(after)
            after[after.index(-1)] = math.prod(before) // known if known else 0
        if math.prod(after) != math.prod(before):
            raise _refuse(func, x, f"to {after} does not preserve the number of elements")
    else:
        after = list(func(torch.empty(before, device="meta"), *args, **kwargs).shape)

    if isinstance(x, PendingTensor):
        unfolded = [x.patches.batch_size, x.shape[1], *before[2:]]
        if x.folded is None or not x.bare or after != unfolded:
            raise _refuse_pending(func)
        return x.settled(unfold=True)
    if before[0] > 1 and after == [1, before[0] * before[1], *before[2:]] and x.axes == tuple(range(2, x.ndim)):
        return PendingTensor.of(x, folded=1)  # for a convolution with separate weights per sample

    stored: list[int] = []  # stored sizes for `after`
    axes: list[int] = []  # the spatial axes of the result
    for inputs, outputs in _matching_axes(before, after):
        special = [axis for axis in inputs if axis == 0 or axis in x.axes]
        wide_in = [axis for axis in inputs if axis in special or before[axis] > 1]
        wide_out = [axis for axis in outputs if after[axis] > 1] or outputs[:1]
        if not special:
            stored += [after[axis] for axis in outputs]
        elif not outputs:
            raise _refuse(func, x, f"to {after} drops part of the map")
        elif inputs == outputs == [0]:
            stored.append(x.shape[0])
        elif 0 in special:
            raise _refuse(func, x, f"to {after} mixes the batch with other axes")
        elif _splits_like_grid(x, inputs, [after[axis] for axis in outputs]):  # unflattens the map
            axes += outputs
            stored += [after[axis] // cells for axis, cells in zip(outputs, x.patches.grid, strict=True)]
        elif wide_in == special and len(wide_out) == 1 and (len(special) == 1 or tuple(special) == x.axes):
            axes += wide_out  # one spatial axis as it is, or all of them into one
            size = math.prod(x.shape[axis] for axis in special)
            stored += [size if axis in wide_out else 1 for axis in outputs]
        elif (
            len(special) == 1
            and len(x.axes) == x.patches.rank
            and wide_in[0] == special[0]
            and (len(wide_out) == 1 or (len(wide_in) == 1 and _divides_blocks(x, special[0], after[wide_out[0]])))
        ):
            # Splits a spatial axis into coarser positions and offsets within them (space to depth), or the reverse.
            cells = x.patches.grid[x.axes.index(special[0])]
            axes.append(wide_out[0])
            stored += [after[axis] // cells if axis == wide_out[0] else after[axis] for axis in outputs]
        else:
            raise _refuse(func, x, f"to {after} mixes part of the map with other axes")
    out = like(x, x.reshape(stored), tuple(axes))
    if len(axes) < x.patches.rank and len(x.axes) == x.patches.rank:
        out.flat = block_of(x)  # to unflatten it later
    return out


def _splits_like_grid(x: PackedTensor, inputs: list[int], sizes: list[int]) -> bool:
    grid = x.patches.grid
    if len(x.axes) == 1 < x.patches.rank and tuple(inputs) == x.axes and len(sizes) == len(grid):
        blocks = [size // cells for size, cells in zip(sizes, grid, strict=True)]
        whole = all(size == block * cells for size, block, cells in zip(sizes, blocks, grid, strict=True))
        return whole and tuple(blocks) == x.flat
    return False


def _divides_blocks(x: PackedTensor, axis: int, size: int) -> bool:
    """Whether splitting an axis into `size` coarser positions cuts no patch."""
    cells = x.patches.grid[x.axes.index(axis)]
    return size % cells == 0 and x.shape[axis] % (size // cells) == 0


def _matching_axes(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes with equally many elements into the shortest runs of axes with equal products.

    >>> _matching_axes([2, 12, 4, 4], [2, 3, 4, 16])
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after):
            inputs, outputs = [i], [j]
            left, right = before[i], after[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right and i < len(before):
                    left, i = left * before[i], i + 1
                    inputs.append(i - 1)
                elif j < len(after):
                    right, j = right * after[j], j + 1
                    outputs.append(j - 1)
                else:
                    break
            groups.append((inputs, outputs))
        elif i < len(before):
            groups.append(([i], []))
            i += 1
        else:
            groups.append(([], [j]))
            j += 1
    return groups


@register_rule("unsqueeze")
def _unsqueeze(func: Callable[..., Any], x: PackedTensor, dim: int) -> Tensor:
    _refuse_in_place(func, x)
    at = dim % (x.ndim + 1)
    if at == 0:
        raise _refuse(func, x, "puts an axis before the batch")
    return like(x, x.unsqueeze(at), tuple(axis + (axis >= at) for axis in x.axes))


@register_rule("squeeze")
def _squeeze(func: Callable[..., Any], x: PackedTensor, *args: Any, dim: Any = None) -> Tensor:
    _refuse_in_place(func, x)
    shape = dense_shape(x)
    dims = args if dim is None else (dim,)
    asked = _sizes(dims) if dims else list(range(x.ndim))
    gone = {dim % x.ndim for dim in asked if shape[dim] == 1}
    if 0 in gone or gone & set(x.axes):
        raise _refuse(func, x, "removes the batch or part of the map")
    return like(x, x.squeeze(tuple(gone)), tuple(axis - sum(dim < axis for dim in gone) for axis in x.axes))


@register_rule("expand_as")
def _expand_as(func: Callable[..., Any], x: Tensor, other: PackedTensor) -> Tensor:
    if isinstance(x, PackedTensor):
        return like(other, align(other, x).expand(other.shape))
    return like(other, align(other, x).expand(other.shape))


@register_rule("expand", "broadcast_to")
def _expand(func: Callable[..., Any], x: PackedTensor, *args: Any) -> Tensor:
    shape, sizes = dense_shape(x), _sizes(args)
    lead = len(sizes) - x.ndim
    kept = [0, *x.axes]
    if lead or any(sizes[axis] not in (-1, shape[axis]) for axis in kept):
        raise _refuse(func, x, f"to {sizes} changes the batch or the map")
    return like(x, x.expand([-1 if axis in kept else size for axis, size in enumerate(sizes)]))


def _free_dim(func: Callable[..., Any], x: PackedTensor, dim: int) -> int:
    dim %= x.ndim
    if dim == 0 or dim in x.axes:
        raise _refuse(func, x, f"along axis {dim} cuts the batch or the map")
    return dim


@register_rule("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def _split(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    _free_dim(func, x, kwargs["dim"] if "dim" in kwargs else (args[1] if len(args) > 1 else 0))
    parts = func(x, *args, **kwargs)
    return tuple(like(x, part) for part in parts)


@register_rule("unbind", "select")
def _drop_axis(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Any:
    dim = _free_dim(func, x, kwargs["dim"] if "dim" in kwargs else (args[0] if args else 0))
    axes = tuple(axis - (axis > dim) for axis in x.axes)
    out = func(x, *args, **kwargs)
    return tuple(like(x, part, axes) for part in out) if isinstance(out, tuple | list) else like(x, out, axes)


@register_rule("narrow", "index_select", "flip", "roll")
def _along_axis(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    position = {"narrow": 0, "index_select": 0, "flip": 0, "roll": 1}[func.__name__]
    dims = kwargs.get("dim", kwargs.get("dims", args[position] if len(args) > position else 0))
    if func.__name__ == "flip" and args:
        dims = _sizes(args)
    if isinstance(dims, Sequence) and not dims:
        raise _refuse(func, x, "without axes has no rule")
    for dim in dims if isinstance(dims, Sequence) else [dims]:
        _free_dim(func, x, dim)
    return like(x, func(x, *args, **kwargs))


@register_rule("cat", "concat", "concatenate", "stack")
def _join(func: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    x = next(tensor for tensor in tensors if isinstance(tensor, PackedTensor))
    stacking = func.__name__ == "stack"
    if any(tensor.ndim != x.ndim for tensor in tensors):
        raise _refuse(func, x, "joins maps of different ranks")
    at = kwargs.get("axis", dim) % (x.ndim + stacking)
    if at == 0 or (at in x.axes and not stacking):
        raise _refuse(func, x, f"along axis {at} extends the batch or the map")
    aligned = []
    for tensor in tensors:
        tensor = align(x, tensor)
        aligned.append(tensor.expand(x.shape[0], *(block if axis in x.axes else tensor.shape[axis]
                                                   for axis, block in enumerate(x.shape) if axis)))  # fmt: skip
    axes = tuple(axis + (stacking and axis >= at) for axis in x.axes)
    return like(x, func(aligned, dim=at), axes)


@register_rule("getitem")
def _getitem(func: Callable[..., Any], x: PackedTensor, index: Any) -> Tensor:
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, slice) or _is_index(item) for item in items):
        raise _refuse(func, x, "by an index tensor has no rule; use slices or index_select")
    items = [operator.index(item) if _is_index(item) else item for item in items]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        explicit = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (x.ndim - explicit)
    shape, axes, stored = dense_shape(x), [], []
    source = target = 0
    for item in items + [slice(None)] * (x.ndim - sum(item is not None for item in items)):
        if item is None:
            if source == 0:
                raise _refuse(func, x, "puts an axis before the batch")
            target += 1
        else:
            if source in x.axes:
                item = _local_slice(func, x, item, shape[source], x.shape[source])
                axes.append(target)
            elif source == 0 and item != slice(None):
                raise _refuse(func, x, "takes part of the batch")
            target += not isinstance(item, int)
            source += 1
        stored.append(item)
    return like(x, x[tuple(stored)], tuple(axes))


def _is_index(item: Any) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool | Tensor)


def _local_slice(func: Callable[..., Any], x: PackedTensor, item: Any, size: int, block: int) -> slice:
    """Returns the slice within a patch for a slice of the map that takes the same of every patch, such as `1::2`."""
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step > 0 and block % step == 0 and start < step and stop > size - step + start:
            return slice(start, None, step)
    raise _refuse(func, x, "takes part of the map")
