"""Convolution of a packed map into a dense one, with the same vector at every hidden position.

By linearity, an output is the sum of what each tap contributes: the product of the tap's weight with a visible row or
with the vector. Each product is computed once per row, so work shrinks with what is hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.autograd.function import once_differentiable

from sparkmim.errors import UserError
from sparkmim.sparse.gather import added, gathered_chunks, join, product
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.packed import PackedTensor, block_of, to_rows


class _FilledConvolution(torch.autograd.Function):
    """Convolves rows `[R, C]` and the vector `fill` `[C]` by `[out, C, *kernel]` to dense rows `[B · prod(S), out]`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, fill: Tensor, weight: Tensor, bias: Tensor | None, patches: PatchLayout,
        block: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, fill, weight)
        ctx.patches, ctx.block = patches, block
        kernel = tuple(weight.shape[2:])
        table = patches.dense_table(block, kernel)  # [B · prod(S), taps], R where hidden, R + 1 outside of the image
        taps, out = table.shape[1], weight.shape[0]
        offset = rows.new_zeros(taps, out)
        if bias is not None:
            offset[taps // 2] = bias  # the central tap is always inside
        extended = torch.cat([rows, fill[None].to(rows.dtype), rows.new_zeros(1, rows.shape[1])])  # [R + 2, C]
        products = product(extended, _as_matrix(weight, rows.dtype), offset.flatten())  # [R + 2, taps · out]
        entries = table * taps + torch.arange(taps, dtype=table.dtype, device=table.device)
        return F.embedding_bag(entries, products.view(-1, out), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gathers, for each visible row, the gradients of the outputs that read it: `G` `[R, taps · out]`."""
        rows, fill, weight = ctx.saved_tensors
        of_rows, of_fill, of_weight, of_bias = ctx.needs_input_grad[:4]
        grad = grads[0].contiguous()  # [B · prod(S), out]
        kernel = tuple(weight.shape[2:])
        matrix = _as_matrix(weight, grad.dtype).t().contiguous()  # [taps · out, C]
        parts: list[Tensor] = []
        total: Tensor | None = None
        for part, read in gathered_chunks(grad, ctx.patches.readers(ctx.block, kernel)):
            if of_rows:
                parts.append(product(read, matrix))
            if of_weight:
                total = added(total, read.t() @ rows[part])  # [taps · out, C]
        grad_fill = grad_weight = None
        if of_fill or of_weight:
            hidden = ctx.patches.dense_table(ctx.block, kernel) == rows.shape[0]
            of_hidden = (hidden.to(grad.dtype).t() @ grad).flatten()  # [taps · out]
            grad_fill = of_hidden @ matrix if of_fill else None
            if total is not None:
                total = added(total, torch.outer(of_hidden, fill.to(grad.dtype)))
                taps_first = total.view(-1, *weight.shape[:2])  # [taps, out, C]
                grad_weight = torch.empty_like(weight)  # in the weight's own memory format
                grad_weight.copy_(torch.unflatten(taps_first.permute(1, 2, 0), 2, kernel))
        return join(parts) if of_rows else None, grad_fill, grad_weight, grad.sum(0) if of_bias else None, None, None


def _as_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshapes a weight `[out, C, *kernel]` to `[C, taps · out]`."""
    return weight.to(dtype).flatten(2).permute(1, 2, 0).flatten(1)


def filled_convolution(x: PackedTensor, fill: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves the dense map of `x`, filled at hidden positions, with stride 1 to a map of the same size.

    Equal to `conv(unpack(x, fill), weight, bias, padding="same")`.

    Args:
        x: packed map `[B, C, *S]`.
        fill: vector at hidden positions, `[1, C, 1, …]`.
        weight: `[out, C, *kernel]`, odd along each axis.
        bias: `[out]`.

    Returns:
        Dense map `[B, out, *S]`, in channels-last memory.

    Raises:
        ValueError: if the kernel is even along an axis.
    """
    if not all(size % 2 for size in weight.shape[2:]):
        raise UserError(f"the kernel {list(weight.shape[2:])} has no centre; its sizes must be odd")
    patches = x.patches
    device = x.device.type
    with DisableTorchFunctionSubclass():
        values, block = x.values, block_of(x)
        if torch.is_autocast_enabled(device) and values.dtype != torch.float64:
            values = values.to(torch.get_autocast_dtype(device))  # autocast does not see the products
        with torch.autocast(device, enabled=False):
            rows: Tensor = _FilledConvolution.apply(to_rows(values), fill.flatten(), weight, bias, patches, block)
    sizes = (cells * extent for cells, extent in zip(patches.grid, block, strict=True))
    return rows.view(patches.batch_size, *sizes, -1).movedim(-1, 1)
