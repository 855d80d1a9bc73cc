"""Operations that are right patch by patch, or that reduce per channel over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.gather import multiply_rows
from sparkmim.sparse.packed import (
    PackedTensor,
    UnsupportedOperation,
    block_of,
    dense_shape,
    from_rows,
    gather_patches,
    like,
    register_rule,
    to_rows,
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
QUERIES = """
    dim ndimension get:ndim get:dtype get:device get:layout get:names get_device get:is_cuda get:is_cpu get:is_meta
    get:is_mps get:is_xpu get:is_sparse get:is_mkldnn get:is_quantized get:is_nested is_floating_point is_complex
    element_size get:itemsize get:requires_grad
"""
AUTOGRAD = """
    set:requires_grad get:grad_fn get:is_leaf get:grad get:retains_grad get:output_nr get:version is_inference
    register_hook retain_grad backward data_ptr
"""
SAME = "to type type_as float double half bfloat16 cuda cpu clone detach alias get:data"
NEW = "new_empty new_zeros new_ones new_full new_tensor"


def align(x: PackedTensor, other: Tensor) -> Tensor:
    """Converts an operand so that it broadcasts with the stored `x` as it would with the dense map.

    Operands that vary by sample are repeated for the patches of each sample; those that vary by position are packed.
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
    if other.shape == x.shape:  # stored like x: a gradient in a custom autograd function of the network
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
    others = (*args, *kwargs.values())
    if not isinstance(x, PackedTensor) or any(isinstance(arg, Tensor) and arg.ndim for arg in others):
        return elementwise(func, x, *args, **kwargs)
    out: Tensor = func(x, *args, **kwargs)
    return like(x, out)


@register_rule(*BINARY.split())
def elementwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Applies an elementwise operation to packed tensors, dense tensors and numbers."""
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
    """Dropout of whole channels, drawn per sample rather than per patch."""
    if func.__name__.startswith("feature_alpha"):
        raise UnsupportedOperation("`feature_alpha_dropout` has no rule for masked images; use dropout")
    if 1 in x.axes:
        raise UnsupportedOperation(f"`{func.__name__}` of a masked map {list(dense_shape(x))} with channels not second")
    ones = x.new_ones(x.patches.batch_size, x.shape[1], *(1,) * (x.ndim - 2))
    return elementwise(torch.Tensor.mul_ if inplace else torch.mul, x, F.dropout(ones, p, training))


@register_rule("linear")
def _linear(func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(x, PackedTensor) or x.ndim - 1 in x.axes or weight.ndim != 2:
        raise UnsupportedOperation("`linear` needs channels last in a masked map, and a dense weight")
    rows = multiply_rows(x.reshape(-1, x.shape[-1]), weight, bias)
    return like(x, rows.view(*x.shape[:-1], -1))


@register_rule("batch_norm")
def _batch_norm(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Batch normalisation: the statistics of the stored patches are those of the visible positions."""
    if 1 in x.axes:
        raise UnsupportedOperation(f"`batch_norm` of a map {list(dense_shape(x))} whose second axis is spatial")
    if math.prod(x.shape[2:]) == 1 and x.device.type == "cpu":
        # [n, C, 1, 1] counts as contiguous and as channels-last. CPU kernels then go channel by channel, which takes
        # ten times as long.
        rows = to_rows(x)  # [R, C]
        image = from_rows(rows, 1, (rows.shape[0], 1))  # [1, C, R, 1], channels-last only
        return like(x, from_rows(to_rows(func(image, *args, **kwargs)), x.shape[0], x.shape[2:]))
    return like(x, func(x, *args, **kwargs))


@register_rule("batch_norm_stats", "batch_norm_backward_reduce", "batch_norm_gather_stats_with_counts")
def _sync_statistics(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Operations in the autograd function of `SyncBatchNorm`, which receives packed tensors."""
    return func(*(arg.values if isinstance(arg, PackedTensor) else arg for arg in args), **kwargs)


@register_rule("batch_norm_elemt")
def _sync_normalise(func: Callable[..., Any], x: PackedTensor, *args: Any) -> Tensor:
    return like(x, func(x, *args))


@register_rule("batch_norm_backward_elemt")
def _sync_backward(func: Callable[..., Any], grad: Tensor, x: PackedTensor, *args: Any) -> Tensor:
    out: Tensor = func(grad, x.values, *args)
    return out


@register_rule("layer_norm", "rms_norm")
def _layer_norm(
    func: Callable[..., Any], x: PackedTensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:
    if max((0, *x.axes)) >= x.ndim - len(normalized_shape):
        raise UnsupportedOperation(
            f"`{func.__name__}` over {list(normalized_shape)} normalises positions by parameters of their own; "
            "normalise channels only"
        )
    return like(x, func(x, normalized_shape, *args, **kwargs))


@register_rule("local_response_norm")
def _local_response_norm(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Normalisation over neighbouring channels at each position."""
    if 1 in x.axes:
        raise UnsupportedOperation(f"`local_response_norm` of a map {list(dense_shape(x))} with channels not second")
    return like(x, func(x, *args, **kwargs))


@register_rule("get:shape", pending=True)
def _shape(func: Callable[..., Any], x: PackedTensor, *_: Any) -> torch.Size:
    return dense_shape(x)


@register_rule("size", pending=True)
def _size(func: Callable[..., Any], x: PackedTensor, dim: int | None = None) -> torch.Size | int:
    return dense_shape(x) if dim is None else dense_shape(x)[dim]


@register_rule("len", pending=True)
def _len(func: Callable[..., Any], x: PackedTensor) -> int:
    return x.patches.batch_size


@register_rule("repr", "format", pending=True)
def _repr(func: Callable[..., Any], x: PackedTensor, *_: Any, **__: Any) -> str:
    block = "×".join(map(str, block_of(x)))
    return f"PackedTensor(shape={list(dense_shape(x))}, dtype={x.dtype}, {x.patches!r}, block={block})"


@register_rule(*QUERIES.split(), pending=True)
# `numel` counts stored elements, the visible ones, as normalisation code needs.
@register_rule(*AUTOGRAD.split(), "numel", "nelement")
def _as_stored(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


@register_rule("is_contiguous")
def _is_contiguous(func: Callable[..., Any], x: PackedTensor, *_: Any, **__: Any) -> bool:
    return True  # packed tensors have no public memory format


@register_rule("contiguous")
def _contiguous(func: Callable[..., Any], x: PackedTensor, *_: Any, **__: Any) -> PackedTensor:
    """Copies views, so that they share no memory; keeps the memory format."""
    return like(x, x.clone()) if x._is_view() else x


@register_rule(*SAME.split(), "detach_", "requires_grad")
def _same_elements(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(x, *args, **kwargs)
    return like(x, out) if isinstance(x, PackedTensor) else out


@register_rule(*NEW.split())
def _new(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(x, *args, **kwargs)
    return out
