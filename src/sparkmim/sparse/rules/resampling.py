"""Padding, interpolation and pixel shuffling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.packed import (
    PackedTensor,
    PendingTensor,
    UnsupportedOperation,
    block_of,
    dense_shape,
    like,
    on_dense_map,
    register_rule,
)


@register_rule("pad", pending=True)
def _pad(
    func: Callable[..., Any], x: PackedTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """Records the border for the operation that follows, which sees zeros at masked positions."""
    pairs = [(int(before), int(after)) for before, after in zip(pad[::2], pad[1::2], strict=True)]
    border = {x.ndim - 1 - place: pair for place, pair in enumerate(pairs) if any(pair)}  # by axis
    value = 0.0 if value is None else float(value)
    if not border and not isinstance(x, PendingTensor):
        return like(x, x.clone())
    on_map = [axis for axis in border if axis in x.axes]
    if not on_map and not isinstance(x, PendingTensor) and 0 not in border:
        return like(x, func(x, pad, mode, value))  # channels
    if len(on_map) < len(border) or len(x.axes) != x.patches.rank:
        raise UnsupportedOperation(f"`pad` of a masked map {list(dense_shape(x))} by {list(pad)}: pad its spatial axes")
    new = tuple(border.get(axis, (0, 0)) for axis in x.axes)
    if isinstance(x, PendingTensor):
        if not x.bare and ((mode, value) != (x.border_mode, x.border_value) or mode != "constant"):
            raise UnsupportedOperation("`pad` of a masked map that was padded in another way has no rule")
        if any(old < 0 < more for pairs in zip(x.border, new, strict=True) for old, more in zip(*pairs, strict=True)):
            raise UnsupportedOperation("`pad` of a masked map that was cropped has no rule")
        new = tuple((a + c, b + d) for (a, b), (c, d) in zip(x.border, new, strict=True))
    return PendingTensor.of(x, new, mode, value, x.folded if isinstance(x, PendingTensor) else None)


@register_rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(
    func: Callable[..., Any],
    x: PackedTensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Interpolation: nearest by an integer factor stays within a patch; other modes see zeros at masked positions."""
    if x.axes == tuple(range(2, 2 + x.patches.rank)) and mode == "nearest" and func.__name__ != "upsample_bilinear":
        sizes = dense_shape(x)[2:]
        if size is not None:
            wanted = [size] * len(sizes) if isinstance(size, int) else list(size)
        else:
            factors = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor or 1.0] * len(sizes)
            exact = [extent * factor for extent, factor in zip(sizes, factors, strict=True)]
            wanted = [int(extent) for extent in exact]
        pairs = list(zip(wanted, sizes, block_of(x), strict=True))
        whole = size is not None or kwargs.get("recompute_scale_factor") or wanted == exact
        if whole and all(new % old == 0 or (old % new == 0 and block % (old // new) == 0) for new, old, block in pairs):
            return like(x, F.interpolate(x, size=[block * new // old for new, old, block in pairs], mode="nearest"))
    # `contiguous`: with `antialias`, PyTorch's result depends on the memory format of narrow maps.
    return on_dense_map(
        x, func.__name__, lambda dense: func(dense.contiguous(), size, scale_factor, mode, *args, **kwargs)
    )


@register_rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(func: Callable[..., Any], x: PackedTensor, *factors: int, **named: int) -> Tensor:
    """Shuffles of the channels of a position, or of a small block of positions, within a patch."""
    (factor,) = (*factors, *named.values())  # upscale_factor, downscale_factor or groups
    if x.axes != tuple(range(2, 2 + x.patches.rank)) or (x.patches.rank == 1 and "pixel" in func.__name__):
        raise UnsupportedOperation(f"`{func.__name__}` of a masked map {list(dense_shape(x))} with channels not second")
    if func.__name__ == "pixel_unshuffle" and any(size % factor for size in block_of(x)):
        raise UnsupportedOperation(
            f"`pixel_unshuffle` by {factor} does not divide the {block_of(x)[0]} position(s) that a patch has here; "
            "use a patch size that is a multiple of the network's total stride"
        )
    return like(x, func(x, factor))
