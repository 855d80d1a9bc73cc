"""Attention and matrix products over the visible positions of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.packed import PackedTensor, UnsupportedOperation, like, register_rule
from sparkmim.sparse.rules.reduction import sum_by_sample


@register_rule("scaled_dot_product_attention")
def _attention(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention of flattened maps `[B, …, positions, d]` among the visible positions of each sample."""
    parts = [part for part in (query, key, value) if isinstance(part, PackedTensor)]
    flat = all(part.axes == (part.ndim - 2,) and part.patches is parts[0].patches for part in parts)
    alike = len({part.ndim for part in parts}) == 1
    if len(parts) < 3 or not flat or not alike or attn_mask is not None or is_causal:
        raise UnsupportedOperation(
            "`scaled_dot_product_attention` of masked maps has a rule for all positions of a sample with each other, "
            "without a bias by position"
        )
    patches = parts[0].patches

    def attend(count: int, *stored: Tensor) -> Tensor:
        """Attends within each of `count` samples, given patches `[count · m, …, b, d]`."""
        # [count, m, …, b, d] -> [count, …, m · b, d]
        whole = [torch.unflatten(part, 0, (count, -1)).movedim(1, -3).flatten(-3, -2) for part in stored]
        out: Tensor = func(*whole, dropout_p=dropout_p, **kwargs)
        return torch.unflatten(out, -2, (-1, query.shape[-2])).movedim(-3, 1).flatten(0, 1)

    if patches.uniform:
        return like(parts[0], attend(patches.batch_size, *parts))
    by_sample = zip(*(torch.split(part, list(patches.counts)) for part in parts), strict=True)
    return like(parts[0], torch.cat([attend(1, *sample) for sample in by_sample]))


@register_rule("matmul", "rmatmul")
def _matmul(func: Callable[..., Any], x: Tensor, other: Tensor) -> Tensor:
    """Product over channels, with one matrix for all or per sample, or over the visible positions of each sample."""
    if func.__name__ == "__rmatmul__":
        x, other = other, x
    left, right = (part if isinstance(part, PackedTensor) else None for part in (x, other))
    if left is not None and right is not None:
        over_positions = left.axes == (left.ndim - 1,) and right.axes == (right.ndim - 2,) and left.flat == right.flat
        if over_positions and left.ndim == right.ndim and left.patches is right.patches:
            return sum_by_sample(torch.matmul(left, right), left.patches)
    elif left is not None and left.ndim - 1 not in left.axes:
        if other.ndim == 2:
            return like(left, torch.matmul(left, other))
        if left.axes == (left.ndim - 2,) and _one_per_sample(other, left):
            return like(left, torch.matmul(left, _for_patches(other, left)))
    elif right is not None and right.axes == (right.ndim - 1,) and _one_per_sample(x, right):
        return like(right, torch.matmul(_for_patches(x, right), right))
    raise UnsupportedOperation(
        "`matmul` of masked maps is defined over channels, or over all positions of flattened maps; this one compares "
        "positions with each other, as attention does"
    )


def _one_per_sample(matrices: Tensor, x: PackedTensor) -> bool:
    return matrices.ndim == x.ndim and matrices.shape[0] in (1, x.patches.batch_size)


def _for_patches(matrices: Tensor, x: PackedTensor) -> Tensor:
    """Repeats the matrix of each sample for its patches."""
    return matrices if matrices.shape[0] == 1 else matrices.index_select(0, x.patches.sample)
