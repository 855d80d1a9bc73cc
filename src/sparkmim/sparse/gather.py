"""Convolution over visible positions as a gather of rows and a matrix product.

The backward pass gathers too, by mirrored tables. It never scatters, so it is deterministic on every device.

`filled_convolution` goes from visible positions to a dense map, with the same vector at every hidden position. By
linearity, an output is the sum of what each tap contributes: the product of the tap's weight with a visible row or with
the vector. Each product is computed once per row, so work shrinks with what is hidden.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.autograd.function import once_differentiable

from sparkmim.errors import UserError
from sparkmim.sparse.layout import PatchLayout, Taps
from sparkmim.sparse.packed import PackedTensor, as_autocast, block_of, to_rows


@dataclass(frozen=True)
class Geometry:
    """Geometry of a sliding window, per spatial axis.

    Attributes:
        block: input positions per patch.
        kernel: window size.
        stride: step between windows.
        padding: positions added before the map.
        dilation: step within a window.
    """

    block: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def out_block(self) -> tuple[int, ...]:
        """Output positions per patch."""
        return tuple(size // step for size, step in zip(self.block, self.stride, strict=True))

    @property
    def taps(self) -> Taps:
        """Offsets at which the window reads, relative to `stride · output position`."""
        return tuple(
            tuple(tap * step - before for tap in range(size))
            for size, step, before in zip(self.kernel, self.dilation, self.padding, strict=True)
        )

    @property
    def span(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First position that the windows of one patch read, and how many."""
        extents = zip(self.out_block, self.stride, self.dilation, self.kernel, strict=True)
        return (
            tuple(-before for before in self.padding),
            tuple((out - 1) * stride + dilation * (kernel - 1) + 1 for out, stride, dilation, kernel in extents),
        )


_CHUNK_BYTES = {"cpu": 4 * 2**20}
"""Size of a chunk of the gathered matrix: on CPUs, what a core's cache holds; on other devices, 1 GiB."""


def extend(rows: Tensor, outside: float = 0.0) -> Tensor:
    """Appends the two rows that tables refer to: zeros for a masked position, `outside` beyond the border."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1]), rows.new_full((1, rows.shape[1]), outside)])


def chunk_size(row_bytes: int, device: torch.device) -> int:
    """Returns the number of rows per chunk."""
    return max(1, _CHUNK_BYTES.get(device.type, 2**30) // row_bytes)


def _gathered(rows: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Gathers rows in chunks: yields a slice of the output rows and their inputs `[m, taps · C]`.

    Every chunk overwrites the one before, so that the memory stays in the cache.
    """
    extended = extend(rows)
    taps, channels = table.shape[1], rows.shape[1]
    size = min(table.shape[0], max(256, chunk_size(taps * channels * rows.element_size(), rows.device)))
    buffer = rows.new_empty(size * taps, channels)
    for start in range(0, table.shape[0], size):
        chunk = table[start : start + size]
        gathered = buffer[: chunk.numel()]
        torch.index_select(extended, 0, chunk.flatten(), out=gathered)
        yield slice(start, start + size), gathered.view(-1, taps * channels)


@functools.cache
def _onednn() -> bool:
    """Tells whether to multiply by oneDNN instead of MKL: faster on an AMD EPYC, slower on an Intel Xeon."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else platform.processor()
    return "GenuineIntel" not in processor


def _by_onednn(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and _onednn()


def product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `rows @ matrix + bias` for `[m, k]` and `[k, out]` by the fastest kernel available.

    For float32 on CPUs, PyTorch multiplies matrices with MKL; oneDNN, its library for convolutions, is faster on AMD's.
    It is called by the operation that torch.compile replaces Linear layers with.
    """
    if _by_onednn(rows):
        if not matrix.t().is_contiguous():
            matrix = matrix.contiguous()  # oneDNN accepts other strides, hundreds of times slower
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), matrix.t(), bias, "none", [], "")
        return out
    return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)


class _MultiplyRows(torch.autograd.Function):
    """Multiplies rows `[m, k]` by a matrix `[out, k]` to `[m, out]`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        return product(rows, matrix.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, matrix), grad, needs = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        return (
            product(grad, matrix) if needs[0] else None,
            grad.t() @ rows if needs[1] else None,
            grad.sum(0) if needs[2] else None,
        )


def multiply_rows(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `F.linear` of rows `[m, k]` and a matrix `[out, k]`, using `product` forward and backward."""
    if _by_onednn(rows) and not torch.is_autocast_enabled("cpu"):
        out: Tensor = _MultiplyRows.apply(rows, matrix, bias)
        return out
    return F.linear(rows, matrix, bias)


def join(parts: list[Tensor]) -> Tensor:
    """Concatenates tensors; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """Adds `part` to a running sum, kept in float32 for parts of half precision."""
    if total is None:
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def owner(x: Tensor) -> Tensor:
    """Returns a tensor on the memory of `x` that is not a view.

    For results of autograd functions: PyTorch forbids in-place operations on views that these return.
    """
    return x.new_empty(0).set_(x)  # type: ignore[call-overload, no-any-return]


class _GatherConvolution(torch.autograd.Function):
    """Convolves rows `[R, C]` by a weight `[out, C, *kernel]` to rows `[m, out]`; the gathered matrix is not stored."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, patches: PatchLayout, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.patches, ctx.geometry = patches, geometry
        table = patches.table(geometry.block, geometry.stride, geometry.taps)
        matrix = weight.to(rows.dtype).movedim(1, -1).flatten(1).t()  # [taps · C, out]
        return owner(join([product(gathered, matrix, bias) for _, gathered in _gathered(rows, table)]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes both gradients from one gather of `grad` by the mirrored tables.

        Each input row gathers the output rows that read it, into `G` `[R, taps · out]`. With the weight as a matrix
        `M` `[taps · out, C]`, the gradient is `G M` for the input and `Gᵀ rows` for `M`.
        """
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = grads[0].contiguous()  # [m, out]
        taps = weight.movedim(1, -1)  # [out, *kernel, C]
        inputs = rows.view(ctx.patches.num_visible, *ctx.geometry.block, -1)
        grad_inputs: Tensor | None = None
        grad_taps = torch.empty_like(taps) if of_weight else None  # in the weight's own memory format
        for here, these, table in _mirrored(ctx.patches, ctx.geometry):
            matrix = taps[these].movedim(0, -2).to(grad.dtype, memory_format=torch.contiguous_format)
            sizes = matrix.shape  # [*taps, out, C]
            matrix = matrix.flatten(0, -2)
            read = inputs[here].flatten(0, -2)  # [R, C]
            parts: list[Tensor] = []
            total: Tensor | None = None
            for part, gathered in _gathered(grad, table):
                if of_rows:
                    parts.append(product(gathered, matrix))
                if of_weight:
                    total = added(total, gathered.t() @ read[part])
            if of_rows:
                found = join(parts).view_as(inputs[here])
                if found.shape == inputs.shape:
                    grad_inputs = found
                else:
                    grad_inputs = torch.zeros_like(inputs) if grad_inputs is None else grad_inputs
                    grad_inputs[here] = found
            if grad_taps is not None and total is not None:
                grad_taps[these] = total.view(sizes).movedim(-2, 0)
        return (
            None if grad_inputs is None else grad_inputs.flatten(0, -2),
            None if grad_taps is None else grad_taps.movedim(-1, 1),
            grad.sum(0) if of_bias else None,
            None,
            None,
        )


def _mirrored(patches: PatchLayout, geometry: Geometry) -> Iterator[tuple[Any, Any, Tensor]]:
    """Builds the tables from input rows to the output rows that read them.

    There is one table per remainder of input positions modulo the stride: positions with the same remainder are read
    by the same taps, and a tap reads positions of one remainder only.

    Yields:
        An index of the input positions in `[n, *block, …]`, an index of their taps in `[out, *kernel, …]`, and the
        table `[n · prod(out_block), taps]`.
    """
    axes = list(zip(geometry.stride, geometry.taps, strict=True))
    for remainder in itertools.product(*(range(step) for step in geometry.stride)):
        used = [
            [tap for tap, offset in enumerate(offsets) if (r - offset) % step == 0]
            for r, (step, offsets) in zip(remainder, axes, strict=True)
        ]
        if not all(used):
            continue  # positions that no window reads
        back = tuple(
            tuple((r - offsets[tap]) // step for tap in chosen)
            for r, chosen, (step, offsets) in zip(remainder, used, axes, strict=True)
        )
        here = (slice(None), *(slice(r, None, step) for r, (step, _) in zip(remainder, axes, strict=True)))
        these = (slice(None), *(_slice(chosen) for chosen in used))
        yield here, these, patches.table(geometry.out_block, (1,) * patches.rank, back)


def _slice(numbers: list[int]) -> slice:
    """Converts evenly spaced numbers to a slice: `[1, 3, 5]` to `slice(1, 6, 2)`."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return slice(numbers[0], numbers[-1] + 1, step)


def gather_convolution(
    rows: Tensor, weight: Tensor, patches: PatchLayout, geometry: Geometry, bias: Tensor | None = None
) -> Tensor:
    """Convolves visible positions by one gather and one matrix product.

    Args:
        rows: rows of the input map, `[n · prod(block), C]`.
        weight: `[out, C, *kernel]`. Cast to the rows' dtype where it is used, so that no copy is stored for the
            backward pass.
        patches: layout of the `n` visible patches.
        geometry: of the sliding kernel.
        bias: `[out]`, in the rows' dtype.

    Returns:
        Rows of the output map, `[n · prod(block / stride), out]`.
    """
    out: Tensor = _GatherConvolution.apply(rows, weight, bias, patches, geometry)
    return out


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
        for part, read in _gathered(grad, ctx.patches.readers(ctx.block, kernel)):
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
    with DisableTorchFunctionSubclass():
        block, values = block_of(x), to_rows(as_autocast(x.values))
        with torch.autocast(x.device.type, enabled=False):
            rows: Tensor = _FilledConvolution.apply(values, fill.flatten(), weight, bias, patches, block)
    sizes = (cells * extent for cells, extent in zip(patches.grid, block, strict=True))
    return rows.view(patches.batch_size, *sizes, -1).movedim(-1, 1)
