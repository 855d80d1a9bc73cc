"""Properties, and operations entry by entry: visible where all operands are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.masked import MaskedTensor, define, masked_among
from sparkmim.sparse.packed import UnsupportedOperation
from sparkmim.sparse.rules.pointwise import AUTOGRAD, BINARY, NEW, QUERIES, SAME, UNARY


@define(*QUERIES.split(), *AUTOGRAD.split(), *NEW.split())
@define("get:shape", "size", "len", "stride", "is_contiguous", "detach_", "requires_grad", "hash")
def _query(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


@define("numel", "nelement")
def _numel(func: Callable[..., Any], x: MaskedTensor) -> int:
    """Counts visible elements, as normalisation code needs."""
    return int(x.mask.sum())


@define("repr", "format")
def _repr(func: Callable[..., Any], x: MaskedTensor, *_: Any, **__: Any) -> str:
    return f"MaskedTensor(shape={list(x.shape)}, dtype={x.dtype}, {x.patches!r})"


@define(*UNARY.split(), *BINARY.split(), *SAME.split())
@define("contiguous", "prelu", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def elementwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    operands = masked_among([*args, *kwargs.values()])
    target = args[0]
    if not isinstance(target, MaskedTensor):
        if _names_in_place(func):
            raise UnsupportedOperation(f"`{func.__name__}` would write a masked map into a dense tensor")
    elif _names_in_place(func) or any(value is True for value in (*args, *kwargs.values())):  # `inplace`, maybe
        copy = target.clone()
        out = func(copy, *args[1:], **kwargs)
        if copy._version:
            mask = functools.reduce(torch.logical_and, (operand.mask for operand in operands), target.mask)
            target.copy_(torch.where(mask, out, out.new_zeros(())))
            target.mask = mask
            return target
    out = func(*args, **kwargs)
    mask = functools.reduce(torch.logical_and, (operand.mask for operand in operands)).expand(out.shape)
    return MaskedTensor.wrap(out, mask.to(out.device), operands[0].patches, _common_grid_mask(func, operands, out.ndim))


def _names_in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name in _IN_PLACE if name.startswith("__") else name.endswith("_")


_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


def _common_grid_mask(func: Callable[..., Any], operands: Sequence[MaskedTensor], ndim: int) -> Tensor | None:
    found = [x.grid_mask for x in operands if x.grid_mask is not None and x.ndim == ndim]
    if any(other is not found[0] and not torch.equal(found[0], other) for other in found[1:]):
        raise UnsupportedOperation(f"`{func.__name__}` of maps that are off the grid of patches in different ways")
    return found[0] if found else None


@define("setitem")
def _setitem(func: Callable[..., Any], target: Tensor, index: Any, value: Any) -> None:
    if not isinstance(target, MaskedTensor):
        raise UnsupportedOperation("a masked map cannot be written into a dense tensor; join them with torch.cat")
    values, mask = target.clone(), target.mask.clone()
    values[index] = value
    if isinstance(value, MaskedTensor):
        mask[index] = value.mask
    target.copy_(torch.where(mask, values, values.new_zeros(())))
    target.mask = mask
