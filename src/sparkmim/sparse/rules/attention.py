"""Attention among the visible positions of a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkmim.sparse.packed import PackedTensor, UnsupportedOperation, like, register_rule


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
    """Of flattened maps `[B, …, positions, d]`. Masked positions ask nothing and are not attended to."""
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
        """`count` samples at once: `[samples · m, …, b, d]` each."""
        # [samples, m, …, b, d] -> [samples, …, m · b, d]
        whole = [torch.unflatten(part, 0, (count, -1)).movedim(1, -3).flatten(-3, -2) for part in stored]
        out: Tensor = func(*whole, dropout_p=dropout_p, **kwargs)
        return torch.unflatten(out, -2, (-1, query.shape[-2])).movedim(-3, 1).flatten(0, 1)

    if patches.uniform:
        return like(parts[0], attend(patches.batch_size, *parts))
    by_sample = zip(*(torch.split(part, list(patches.counts)) for part in parts), strict=True)
    return like(parts[0], torch.cat([attend(1, *sample) for sample in by_sample]))
