"""Elementwise operations: already right on the stored patches, once the operands are lined up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.packed import (
    PackedTensor,
    UnsupportedOperation,
    block_of,
    dense_shape,
    gather_patches,
    like,
    register_rule,
)

UNARY = """
    abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bitwise_not ceil clamp
    clamp_max clamp_min clip cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 fix floor frac i0 isfinite isinf
    isnan lgamma log log10 log1p log2 logical_not logit mvlgamma nan_to_num neg negative polygamma positive pos
    rad2deg reciprocal round rsqrt sgn sigmoid sign signbit sin sinc sinh softplus sqrt square tan tanh trunc invert
    relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh hardshrink softshrink
    softsign tanhshrink threshold logsigmoid log_sigmoid dropout alpha_dropout
    zeros_like ones_like empty_like full_like rand_like randn_like bernoulli fill zero
"""
BINARY = """
    add radd iadd sub subtract rsub isub mul multiply rmul imul div divide true_divide truediv rtruediv itruediv
    rdiv floor_divide floordiv rfloordiv remainder mod rmod fmod pow rpow ipow float_power addcmul addcdiv lerp atan2
    arctan2 hypot copysign maximum minimum fmax fmin heaviside logaddexp logaddexp2 nextafter xlogy
    where masked_fill copy
    eq ne lt le gt ge greater greater_equal less less_equal not_equal logical_and logical_or logical_xor
    bitwise_and bitwise_or bitwise_xor and or xor
"""


def align(x: PackedTensor, other: Tensor) -> Tensor:
    """Brings an operand to the stored shape of `x`, so that broadcasting means what it means on dense maps.

    What varies by sample is repeated for the sample's patches; what varies by position is packed.
    """
    if isinstance(other, PackedTensor):
        if other.patches is not x.patches or other.ndim != x.ndim or other.axes != x.axes:
            raise UnsupportedOperation("the operands are masked differently, or their axes stand in another order")
        if block_of(other) != block_of(x) or other.flat != x.flat:
            raise UnsupportedOperation(
                f"the operands' maps have different sizes, {list(dense_shape(x))} and {list(dense_shape(other))}"
            )
        return other
    if other.ndim == 0:
        return other
    if other.shape == x.shape:  # stored like x: a gradient, in the backward of the network's own autograd functions
        return other
    if other.ndim > x.ndim:
        raise UnsupportedOperation(
            f"an operand of shape {list(other.shape)} has more axes than the masked map {list(dense_shape(x))}"
        )
    other = other.reshape((1,) * (x.ndim - other.ndim) + tuple(other.shape))
    spatial = [other.shape[axis] for axis in x.axes]
    if any(size > 1 for size in spatial):
        if spatial != [dense_shape(x)[axis] for axis in x.axes] or len(x.axes) != x.patches.rank:
            raise UnsupportedOperation(
                f"an operand of shape {list(other.shape)} does not fit the masked map {list(dense_shape(x))}"
            )
        last = tuple(range(2, 2 + x.patches.rank))
        rest = [axis for axis in range(1, other.ndim) if axis not in x.axes]
        order = (0, *rest, *x.axes)
        # [B, …, *S] -> [B, prod(…), *S] -> patches -> back to the order of x
        moved = other.permute(order).expand(x.patches.batch_size, *(-1,) * (other.ndim - 1))
        shape = moved.shape[1 : 1 + len(rest)]
        packed = gather_patches(moved.reshape(moved.shape[0], -1, *moved.shape[-len(last) :]), x.patches)
        packed = packed.reshape(packed.shape[0], *shape, *packed.shape[2:])
        return torch.permute(packed, [order.index(axis) for axis in range(other.ndim)])
    if other.shape[0] == 1:
        return other
    if other.shape[0] != x.patches.batch_size:
        raise UnsupportedOperation(
            f"an operand of shape {list(other.shape)} does not fit the masked map {list(dense_shape(x))}"
        )
    return torch.index_select(other, 0, x.patches.sample)


@register_rule(*UNARY.split())
def _unary(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = (*args, *kwargs.values())
    if not isinstance(x, PackedTensor) or any(isinstance(arg, Tensor) and arg.ndim for arg in given):
        return elementwise(func, x, *args, **kwargs)
    out: Tensor = func(x, *args, **kwargs)
    return like(x, out)


@register_rule(*BINARY.split())
def elementwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Any elementwise operation on any mixture of packed tensors, dense tensors and numbers."""
    packed = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, PackedTensor)]
    x = max(packed, key=lambda arg: (arg.ndim, arg.numel()))
    inplace = func.__name__.rstrip("_") != func.__name__ and not func.__name__.startswith("__")
    if (inplace or func.__name__.startswith("__i")) and args[0] is not x:
        raise UnsupportedOperation(f"`{func.__name__}` would write a masked map into a smaller or a dense tensor")
    args = tuple(align(x, arg) if isinstance(arg, Tensor) else arg for arg in args)
    kwargs = {key: align(x, arg) if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()}
    out: Tensor = func(*args, **kwargs)
    return like(x, out)


@register_rule("prelu")
def _prelu(func: Callable[..., Any], x: PackedTensor, weight: Tensor) -> Tensor:
    out: Tensor = func(x, weight)
    return like(x, out)


@register_rule("dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_alpha_dropout")
def _feature_dropout(
    func: Callable[..., Any], x: PackedTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Whole channels are dropped per sample, not per patch."""
    if func.__name__.startswith("feature_alpha"):
        raise UnsupportedOperation("`feature_alpha_dropout` has no rule for masked images; use dropout")
    if 1 in x.axes:
        raise UnsupportedOperation(f"`{func.__name__}` of a masked map {list(dense_shape(x))} with channels not second")
    ones = x.new_ones(x.patches.batch_size, x.shape[1], *(1,) * (x.ndim - 2))
    return elementwise(torch.Tensor.mul_ if inplace else torch.mul, x, F.dropout(ones, p, training))
