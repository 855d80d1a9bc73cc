"""Normalisation: over channels or the batch as it is, over the map per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.packed import (
    PackedTensor,
    UnsupportedOperation,
    dense_shape,
    from_rows,
    like,
    register_rule,
    to_rows,
)
from sparkmim.sparse.rules.reduction import over_samples, per_sample


@register_rule("batch_norm")
def _batch_norm(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Statistics over the visible positions of the batch are those of the stored patches."""
    if 1 in x.axes:
        raise UnsupportedOperation(f"`batch_norm` of a map {list(dense_shape(x))} whose second axis is spatial")
    if math.prod(x.shape[2:]) == 1 and x.device.type == "cpu":
        # In memory of both formats at once, CPU kernels go channel by channel, and take ten times as long.
        rows = to_rows(x)  # [R, C]
        image = from_rows(rows, 1, (rows.shape[0], 1))  # [1, C, R, 1], channels-last for certain
        return like(x, from_rows(to_rows(func(image, *args, **kwargs)), x.shape[0], x.shape[2:]))
    return like(x, func(x, *args, **kwargs))


@register_rule("local_response_norm")
def _local_response_norm(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Over neighbouring channels, position by position."""
    if 1 in x.axes:
        raise UnsupportedOperation(f"`local_response_norm` of a map {list(dense_shape(x))} with channels not second")
    return like(x, func(x, *args, **kwargs))


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


def _channels_second(x: PackedTensor) -> PackedTensor:
    if x.axes != tuple(range(2, x.ndim)):
        raise UnsupportedOperation(f"normalisation per sample of a map {list(dense_shape(x))} with channels not second")
    return x


@register_rule("group_norm")
def _group_norm(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    return per_sample(_channels_second(x), lambda sample: func(sample, *args, **kwargs))


@register_rule("instance_norm")
def _instance_norm(
    func: Callable[..., Any],
    x: PackedTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **kwargs: Any,
) -> Tensor:
    if not use_input_stats:
        return like(x, F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps))
    if running_mean is not None and running_var is not None:
        # Running statistics are averaged over the batch; a ragged batch is averaged here, not call by call.
        with torch.no_grad():
            dtype = torch.promote_types(x.dtype, torch.float32)
            moments = over_samples(x.detach(), x, lambda sample: torch.var_mean(sample.to(dtype), -1))
            var, mean = (torch.cat(parts).mean(0) for parts in zip(*moments, strict=True))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return per_sample(
        _channels_second(x), lambda sample: F.instance_norm(sample, None, None, weight, bias, True, 0.0, eps)
    )


@register_rule("batch_norm_stats", "batch_norm_backward_reduce", "batch_norm_gather_stats_with_counts")
def _sync_statistics(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The parts of `SyncBatchNorm`, whose autograd function sees packed tensors from the inside."""
    return func(*(arg.values if isinstance(arg, PackedTensor) else arg for arg in args), **kwargs)


@register_rule("batch_norm_elemt")
def _sync_normalise(func: Callable[..., Any], x: PackedTensor, *args: Any) -> Tensor:
    return like(x, func(x, *args))


@register_rule("batch_norm_backward_elemt")
def _sync_backward(func: Callable[..., Any], grad: Tensor, x: PackedTensor, *args: Any) -> Tensor:
    out: Tensor = func(grad, x.values, *args)
    return out


@register_rule("normalize")
def _normalize(
    func: Callable[..., Any], x: PackedTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **kwargs: Any
) -> Tensor:
    if x.axes == (dim % x.ndim,):
        return per_sample(x, lambda sample: F.normalize(sample, p, -1, eps))
    if dim % x.ndim == 0 or dim % x.ndim in x.axes:
        raise UnsupportedOperation("`normalize` over part of a masked map's axes, or over the batch, has no rule")
    return like(x, func(x, p, dim, eps))
