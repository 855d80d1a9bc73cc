"""Matrix products contract with zeros, and are visible where row and column are; attention sees visible keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.masked import MaskedTensor, by_position, define, is_constant, masked_among
from sparkmim.sparse.packed import UnsupportedOperation


@define("linear")
def _linear(func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(x, MaskedTensor) or isinstance(weight, MaskedTensor):
        raise UnsupportedOperation("`linear` by a masked matrix")
    mask = by_position(func, x, -1)
    return MaskedTensor.wrap(func(x, weight, bias), mask[..., None], x.patches)


@define("matmul", "rmatmul", "bmm")
def _matmul(func: Callable[..., Any], x: Tensor, other: Tensor) -> Tensor:
    if func.__name__ == "__rmatmul__":
        x, other = other, x
    if min(x.ndim, other.ndim) < 2:
        raise UnsupportedOperation("`matmul` of a masked map and a vector; use a matrix of one column")
    _check_contraction(x, other, [-1], [-2])
    rows = x.mask.any(-1, keepdim=True) if isinstance(x, MaskedTensor) else None
    columns = other.mask.any(-2, keepdim=True) if isinstance(other, MaskedTensor) else None
    return _product([x, other], torch.matmul(x, other), [rows, columns])


def _product(factors: Sequence[Tensor], out: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    mask = functools.reduce(torch.logical_and, (mask for mask in masks if mask is not None))
    if bool(mask.all()):
        return out
    return MaskedTensor.wrap(out, mask, masked_among(factors)[0].patches)


def _check_contraction(x: Tensor, other: Tensor, axes: Sequence[int], others: Sequence[int]) -> None:
    """Raises if positions of a map are summed up by a matrix that is the same for every mask."""
    for masked, dense, at in ((x, other, axes), (other, x, others)):
        if not isinstance(masked, MaskedTensor) or isinstance(dense, MaskedTensor):
            continue
        if not is_constant(masked.mask, *(axis % masked.ndim for axis in at)):
            raise UnsupportedOperation(
                "a product that mixes the positions of a masked map by fixed weights, as MLP-Mixers do; it is defined "
                "over channels, and by weights that are computed from the map"
            )


@define("einsum")
def _einsum(func: Callable[..., Any], equation: str, *operands: Any) -> Tensor:
    factors: Sequence[Tensor] = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    inputs, _, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if "." in equation or len(factors) != 2 or "->" not in equation:
        raise UnsupportedOperation(f"`einsum` of a masked map by {equation!r}; write it with two operands and all axes")
    gone = set(inputs) - set(result) - {","}
    summed = [[name.index(axis) for axis in gone & set(name)] for name in names]
    _check_contraction(factors[0], factors[1], summed[0], summed[1])
    masks = []
    for factor, name, places in zip(factors, names, summed, strict=True):
        if isinstance(factor, MaskedTensor):
            seen = factor.mask
            for place in sorted(places, reverse=True):
                seen = seen.any(place)
            kept = [axis for axis in name if axis not in gone]
            order = [kept.index(axis) for axis in result if axis in kept]
            shaped = iter(seen.permute(order).shape)
            masks.append(seen.permute(order).reshape([next(shaped) if axis in kept else 1 for axis in result]))
    return _product(factors, torch.einsum(equation, *factors), masks)


@define("scaled_dot_product_attention")
def _attention(
    func: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if is_causal or any(kwargs.values()):
        raise UnsupportedOperation("`scaled_dot_product_attention` of a masked map, causal or by groups, has no rule")
    with torch._C._EnableTorchFunction():  # these are masked themselves
        logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        attended: Tensor = F.dropout(logits.softmax(-1), dropout_p) @ value
    return attended
