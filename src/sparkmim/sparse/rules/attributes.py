"""What a tensor says of itself, and what leaves its elements as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.packed import PackedTensor, block_of, dense_shape, like, register_rule


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


@register_rule(
    "dim", "ndimension", "get:ndim", "get:dtype", "get:device", "get:layout", "get:names", "get_device",
    "get:is_cuda", "get:is_cpu", "get:is_meta", "get:is_mps", "get:is_xpu", "get:is_sparse", "get:is_mkldnn",
    "get:is_quantized", "get:is_nested", "is_floating_point", "is_complex", "element_size", "get:itemsize",
    "get:requires_grad", pending=True,
)  # fmt: skip
@register_rule(
    "set:requires_grad", "get:grad_fn", "get:is_leaf", "get:grad", "get:retains_grad",
    "get:output_nr", "get:version", "is_inference", "register_hook", "retain_grad", "backward", "data_ptr",
    # The stored elements are the visible ones: what normalisation code counts.
    "numel", "nelement",
)  # fmt: skip
def _as_stored(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


@register_rule("is_contiguous")
def _is_contiguous(func: Callable[..., Any], x: PackedTensor, *_: Any, **__: Any) -> bool:
    return True  # the memory format is the engine's own affair; see `contiguous`


@register_rule("contiguous")
def _contiguous(func: Callable[..., Any], x: PackedTensor, *_: Any, **__: Any) -> PackedTensor:
    """The memory format stays, but what may share memory with another map no longer does."""
    return like(x, x.clone()) if x._is_view() else x


@register_rule(
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "clone", "detach", "detach_",
    "alias", "requires_grad", "get:data",
)  # fmt: skip
def _same_elements(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(x, *args, **kwargs)
    return like(x, out) if isinstance(x, PackedTensor) else out


@register_rule("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
def _new(func: Callable[..., Any], x: PackedTensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(x, *args, **kwargs)
    return out
