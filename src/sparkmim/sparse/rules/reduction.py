"""Operations over the visible positions of each sample: reductions, global pooling, per-sample normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.packed import PackedTensor, UnsupportedOperation, dense_shape, like, register_rule
from sparkmim.sparse.rules.pointwise import elementwise


def over_samples(x: Tensor, x_of: PackedTensor, function: Callable[[Tensor], Any]) -> list[Any]:
    """Calls `function` on the visible positions of whole samples, `[samples, C, positions]`.

    There is one call for the batch if all samples have equally many visible patches, else one per sample.

    Args:
        x: stored patches with spatial axes last, `[n, C, *block]`.
        x_of: packed tensor whose layout `x` has.
        function: called on `[samples, C, positions]`.
    """
    patches = x_of.patches
    if patches.uniform:
        grouped = x.reshape(patches.batch_size, -1, *x.shape[1:])  # [B, m, C, *block]
        return [function(grouped.movedim(1, 2).flatten(2))]
    return [function(part.transpose(0, 1).flatten(1)[None]) for part in torch.split(x, list(patches.counts))]


def sum_by_sample(values: Tensor, patches: PatchLayout) -> Tensor:
    """Sums over the patches of each sample: `[n, …]` to `[B, …]`."""
    if patches.uniform:
        return torch.unflatten(values, 0, (patches.batch_size, -1)).sum(1)
    return torch.stack([part.sum(0) for part in torch.split(values, list(patches.counts))])


def per_sample(x: PackedTensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function to the visible positions of each sample, `[samples, rest, positions]`, keeping the shape.

    `rest` joins all axes other than the batch and the map; for a map `[B, C, *S]`, it is the channels.
    """
    rest = [axis for axis in range(1, x.ndim) if axis not in x.axes]
    order = [0, *rest, *x.axes]
    moved = x.permute(order)  # [n, *rest, *block]
    sizes = moved.shape[1:]
    moved = moved.reshape(x.shape[0], -1, *(x.shape[axis] for axis in x.axes))  # [n, prod(rest), *block]
    parts = [
        part.unflatten(2, (-1, *moved.shape[2:])).movedim(2, 1).flatten(0, 1)  # [samples · m, prod(rest), *block]
        for part in over_samples(moved, x, function)
    ]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    values = values.reshape(x.shape[0], *sizes)
    return like(x, values.permute([order.index(axis) for axis in range(x.ndim)]))


@register_rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp", "norm",
    "vector_norm", "linalg_vector_norm", "prod", "any", "all", "nanmean", "nansum", "count_nonzero", "aminmax",
    "softmax", "log_softmax", "softmin", "argmax", "argmin", "cumsum", "cumprod", "sort", "topk", "median",
)  # fmt: skip
def _reduce(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__.removeprefix("linalg_")
    if name in ("max", "min") and ((args and isinstance(args[0], Tensor)) or "other" in kwargs):
        return elementwise(func, x, *args, **kwargs)
    position = {"norm": 1, "vector_norm": 1, "topk": 1}.get(name, 0)
    dims = _dims(x, name, position, args, kwargs)
    if dims is None:
        if name in ("mean", "sum", "amax", "amin", "max", "min", "any", "all", "nansum", "count_nonzero"):
            return func(x, *args, **kwargs)  # over all visible elements
        raise UnsupportedOperation(f"`{name}` over a whole masked batch has no rule; name the axes")
    spatial = set(x.axes)
    if {0, *spatial} <= set(dims) and name in ("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean"):
        return func(x, *args, **kwargs)  # over all visible positions of the batch, as in BatchNorm
    if 0 in dims:
        raise UnsupportedOperation(f"`{name}` over the batch axis of a masked map {list(dense_shape(x))} has no rule")
    if not spatial & set(dims):
        return _reduce_channels(func, x, dims, args, kwargs)
    if not spatial <= set(dims):
        raise UnsupportedOperation(
            f"`{name}` over axes {dims} of a masked map {list(dense_shape(x))} reduces part of the map's axes: rows "
            "and columns have no fixed number of visible positions"
        )
    if name in ("softmax", "log_softmax", "softmin") and dims == list(x.axes):
        kwargs = {key: value for key, value in kwargs.items() if key != "dim"}
        return per_sample(x, lambda sample: func(sample, -1, *args[1:], **kwargs))
    if name in ("softmax", "log_softmax", "softmin", "argmax", "argmin", "cumsum", "cumprod", "sort", "topk", "median"):
        raise UnsupportedOperation(f"`{name}` over the positions of a masked map has no rule")
    return _reduce_positions(func, x, dims, args, kwargs, position)


def _dims(x: PackedTensor, name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    dim = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    empty = isinstance(dim, Sequence) and not dim
    if isinstance(dim, bool) or dim is None or empty:  # `x.var(False)`: the bool is `unbiased`
        return None
    return [axis % x.ndim for axis in (dim if isinstance(dim, Sequence) else [dim])]


def _reduce_channels(
    func: Callable[..., Any], x: PackedTensor, dims: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    out = func(x, *args, **kwargs)
    first = out if isinstance(out, Tensor) else out[0]
    axes = x.axes
    if first.ndim < x.ndim:
        axes = tuple(axis - sum(dim < axis for dim in dims) for axis in x.axes)
    if isinstance(out, Tensor):
        return like(x, out, axes)
    parts = [like(x, part, axes) for part in out]
    return type(out)(parts) if hasattr(out, "values") else tuple(parts)


def _reduce_positions(
    func: Callable[..., Any],
    x: PackedTensor,
    dims: list[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    position: int,
) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if key not in ("dim", "axis")}
    if len(args) > position + 1 and func.__name__ in ("var", "std", "var_mean", "std_mean"):
        kwargs["unbiased"] = args[position + 1]  # the old signature (dim, unbiased, keepdim)
        args = (*args[: position + 1], *args[position + 2 :])
    keepdim = kwargs.pop("keepdim", kwargs.pop("keepdims", args[position + 1] if len(args) > position + 1 else False))
    lead = args[:position]
    rest = [axis for axis in range(1, x.ndim) if axis not in x.axes]  # neither batch nor map
    kept = [axis for axis in rest if axis not in dims]
    gone = [axis for axis in rest if axis in dims]
    moved = x.permute(0, *kept, *gone, *x.axes)  # [n, *kept, *gone, *block]
    sizes = [x.shape[axis] for axis in kept]
    moved = moved.reshape(x.shape[0], -1, *moved.shape[1 + len(kept) :])  # [n, prod(kept), *gone, *block]

    def reduce(part: Tensor) -> Any:  # [samples, prod(kept), positions] -> [samples, prod(kept)]
        return func(part, *lead, dim=-1, **kwargs)

    def restore(part: Tensor) -> Tensor:
        part = part.reshape(part.shape[0], *sizes)
        for axis in sorted(dims) if keepdim else ():
            part = part.unsqueeze(axis)
        return part

    results = over_samples(moved, x, reduce)
    if isinstance(results[0], Tensor):
        return restore(torch.cat(results))
    if hasattr(results[0], "indices"):
        raise UnsupportedOperation(f"`{func.__name__}` with positions has no rule; use amax or amin")
    return tuple(restore(torch.cat(parts)) for parts in zip(*results, strict=True))


@register_rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
)  # fmt: skip
def _adaptive_pool(
    func: Callable[..., Any],
    x: PackedTensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
) -> Tensor:
    """Global pooling over the visible positions of each sample."""
    sizes = [output_size] if isinstance(output_size, int) or output_size is None else list(output_size)
    fits = x.axes == tuple(range(2, x.ndim)) and int(func.__name__[-2]) == len(x.axes)
    if any(size != 1 for size in sizes) or return_indices or not fits:
        raise UnsupportedOperation(
            f"`{func.__name__}` to {output_size}: only global pooling (output size 1) is defined on a masked map"
        )
    maximum = "max" in func.__name__
    pooled = over_samples(x, x, lambda sample: sample.amax(-1) if maximum else sample.mean(-1))
    out: Tensor = torch.cat(pooled)
    return out.reshape(*out.shape, *(1,) * len(x.axes))  # [B, C, 1, …]


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
        # Running statistics are averaged over the batch here, as a ragged batch takes one call per sample.
        with torch.no_grad():
            dtype = torch.promote_types(x.dtype, torch.float32)
            moments = over_samples(x.detach(), x, lambda sample: torch.var_mean(sample.to(dtype), -1))
            var, mean = (torch.cat(parts).mean(0) for parts in zip(*moments, strict=True))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return per_sample(
        _channels_second(x), lambda sample: F.instance_norm(sample, None, None, weight, bias, True, 0.0, eps)
    )


@register_rule("normalize")
def _normalize(
    func: Callable[..., Any], x: PackedTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **kwargs: Any
) -> Tensor:
    if x.axes == (dim % x.ndim,):
        return per_sample(x, lambda sample: F.normalize(sample, p, -1, eps))
    if dim % x.ndim == 0 or dim % x.ndim in x.axes:
        raise UnsupportedOperation("`normalize` over part of a masked map's axes, or over the batch, has no rule")
    return like(x, func(x, p, dim, eps))
