"""Operations over entries: reductions, softmax and normalisation cover those that are visible."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.definition.pointwise import elementwise
from sparkmim.sparse.masked import MaskedTensor, by_position, define, is_constant
from sparkmim.sparse.packed import UnsupportedOperation
from sparkmim.sparse.rules.kernels import per_axis

_REDUCTIONS = """
    mean sum amax amin max min var std var_mean std_mean logsumexp norm vector_norm linalg_vector_norm nanmean nansum
    any all count_nonzero argmax argmin prod
"""
_LIMITS = {"amax": -math.inf, "max": -math.inf, "argmax": -math.inf, "logsumexp": -math.inf, "amin": math.inf,
           "min": math.inf, "argmin": math.inf, "prod": 1.0, "all": 1.0}  # fmt: skip
"""What reductions see in place of hidden entries; the others see zeros."""


@define(*_REDUCTIONS.split())
def _reduce(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__.strip("_").removeprefix("linalg_")
    if name in ("max", "min") and ((args and isinstance(args[0], Tensor)) or "other" in kwargs):
        return elementwise(func, x, *args, **kwargs)
    lead = 1 if name.endswith("norm") else 0
    dim = kwargs.get("dim", kwargs.get("axis", args[lead] if len(args) > lead else None))
    if isinstance(dim, bool) or dim is None or (isinstance(dim, Sequence) and not dim):
        return func(x.values[x.mask], *args, **kwargs)
    axes = sorted(axis % x.ndim for axis in (dim if isinstance(dim, Sequence) else [dim]))
    whole = is_constant(x.mask, *axes)
    out = func(x, *args, **kwargs) if whole else _over_visible(func, name, x, axes, args, kwargs)
    return _reduced(x, out, _over(x.mask, axes))


def _over(mask: Tensor, axes: Sequence[int]) -> Tensor:
    """Whether anything is visible along axes, which stay, of size 1."""
    for axis in axes:
        mask = mask.any(axis, keepdim=True)
    return mask


def _reduced(x: MaskedTensor, out: Any, mask: Tensor) -> Any:
    """Wraps results of a reduction; those of which nothing is hidden are dense."""
    if not isinstance(out, Tensor):
        parts = [_reduced(x, part, mask) for part in out]
        return type(out)(parts) if hasattr(out, "_fields") or hasattr(out, "values") else tuple(parts)
    if bool(mask.all()) or not out.is_floating_point():
        return out
    return MaskedTensor.wrap(out, mask.reshape(out.shape), x.patches)


def _over_visible(
    func: Callable[..., Any], name: str, x: MaskedTensor, axes: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    values, mask = x.values, x.mask
    if name in ("nanmean", "nansum"):
        mask, name = mask & ~values.isnan(), name.removeprefix("nan")
        values = values.nan_to_num()
    seen = torch.where(mask, values, _LIMITS.get(name, 0.0))
    if name == "sum":
        return seen.sum(axes, _argument("keepdim", args, kwargs, 1, False))
    if name not in _MOMENTS:
        out = func(seen, *args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and name in _LIMITS:
            return torch.where(_over(mask, axes).reshape(out.shape), out, 0.0)
        return out
    count = mask.sum(axes, keepdim=True)
    mean = seen.sum(axes, keepdim=True) / count.clamp(min=1)
    keepdim = _argument("keepdim", args, kwargs, 1 if name == "mean" else 2, False)

    def kept(part: Tensor) -> Tensor:
        return part if keepdim else part.squeeze(tuple(axes))

    if name == "mean":
        return kept(mean)
    correction = kwargs.get("correction", int(_argument("unbiased", args, kwargs, 1, True)))
    squares = torch.where(mask, values - mean, 0.0).square().sum(axes, keepdim=True)
    variance = torch.where(count > 0, squares / (count - correction), 1.0)
    spread = kept(variance.sqrt() if name.startswith("std") else variance)
    return (spread, kept(mean)) if name.endswith("mean") else spread


_MOMENTS = ("mean", "var", "std", "var_mean", "std_mean")


def _argument(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, default: Any) -> Any:
    return kwargs.get(name, kwargs.get(f"{name}s", args[place] if len(args) > place else default))


@define("softmax", "log_softmax", "softmin")
def _softmax(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    limit = math.inf if func.__name__ == "softmin" else -math.inf
    return x.like(func(torch.where(x.mask, x, limit), *args, **kwargs))


@define("cumsum", "cumprod", "sort", "topk", "median", "logcumsumexp")
def _along(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Any:
    dim = _argument("dim", args, kwargs, 1 if func.__name__ == "topk" else 0, -1)
    if not is_constant(x.mask, dim % x.ndim):
        raise UnsupportedOperation(f"`{func.__name__}` over the positions of a masked map has no rule")
    out = func(x, *args, **kwargs)
    seen = x.mask.narrow(dim, 0, 1)
    parts = [out] if isinstance(out, Tensor) else list(out)
    wrapped = [
        MaskedTensor.wrap(part, seen if part.ndim == x.ndim else seen.squeeze(dim), x.patches)
        if part.is_floating_point() else part for part in parts
    ]  # fmt: skip
    return wrapped[0] if isinstance(out, Tensor) else type(out)(wrapped)


@define(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d",
)  # fmt: skip
def _adaptive_pool(func: Callable[..., Any], x: MaskedTensor, output_size: Any, return_indices: bool = False) -> Tensor:
    axes = list(range(2, x.ndim))
    if any(size != 1 for size in per_axis(output_size, len(axes))) or return_indices:
        raise UnsupportedOperation(
            f"`{func.__name__}` to {output_size}: only global pooling (output size 1) is defined on a masked map"
        )
    pool = torch.amax if "max" in func.__name__ else torch.mean
    pooled: Tensor = _reduce(pool, x, axes, keepdim=True)
    return pooled


@define("batch_norm")
def _batch_norm(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = by_position(func, x, 1)  # [N, *S]
    normed = func(x.values.movedim(1, -1)[mask], *args, **kwargs)  # [visible, C]
    out = normed.new_zeros(*mask.shape, x.shape[1])
    out[mask] = normed
    return x.like(out.movedim(-1, 1))


@define("group_norm")
def _group_norm(
    func: Callable[..., Any], x: MaskedTensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    values, mask = (part.reshape(x.shape[0], num_groups, -1) for part in (x.values, x.mask))
    count = mask.sum(2, keepdim=True).clamp(min=1)
    deviations = torch.where(mask, values - values.sum(2, keepdim=True) / count, 0.0)
    variance = deviations.square().sum(2, keepdim=True) / count
    normed = (deviations / (variance + eps).sqrt()).view(x.shape)
    each = (1, -1, *(1,) * (x.ndim - 2))
    normed = normed if weight is None else normed * weight.view(each)
    return x.like(normed if bias is None else normed + bias.view(each))


@define("instance_norm")
def _instance_norm(
    func: Callable[..., Any], x: MaskedTensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return x.like(F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps))
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            variance, mean = _reduce(torch.var_mean, x, list(range(2, x.ndim)))  # [N, C] each
            running_mean.lerp_(mean.mean(0), momentum)
            running_var.lerp_(variance.mean(0), momentum)
    normed: Tensor = _group_norm(func, x, x.shape[1], weight, bias, eps)
    return normed


@define("layer_norm", "rms_norm")
def _layer_norm(
    func: Callable[..., Any], x: MaskedTensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:
    by_position(func, x, *range(-len(normalized_shape), 0))
    return x.like(func(x, normalized_shape, *args, **kwargs))


@define("local_response_norm")
def _local_response_norm(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    by_position(func, x, 1)
    return x.like(func(x, *args, **kwargs))


@define("normalize")
def _normalize(func: Callable[..., Any], x: MaskedTensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.like(func(x, *args, **kwargs))  # zeros add nothing to a norm
