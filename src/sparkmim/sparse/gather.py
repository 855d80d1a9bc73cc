"""The two gathers that sideways operations are made of, each with a backward that is a gather again.

`gather_convolution` turns a convolution over visible positions into one matrix product on rows read by
index; `gather_windows` gives every patch the surroundings that a dense operation needs. Neither ever
scatters, so both are deterministic on every device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.layout import PatchLayout, Taps


@dataclass(frozen=True)
class Geometry:
    """How a window slides over a map, per spatial axis.

    Attributes:
        block: input positions per patch.
        kernel: window size.
        stride: step between windows.
        padding: positions read before the map's first.
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
        """Where the window reads, relative to `stride · output position`."""
        return tuple(
            tuple(tap * step - before for tap in range(size))
            for size, step, before in zip(self.kernel, self.dilation, self.padding, strict=True)
        )

    @property
    def span(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First position and number of positions that the windows of one patch read."""
        extents = zip(self.out_block, self.stride, self.dilation, self.kernel, strict=True)
        return (
            tuple(-before for before in self.padding),
            tuple((out - 1) * stride + dilation * (kernel - 1) + 1 for out, stride, dilation, kernel in extents),
        )


_CHUNK_BYTES = {"cpu": 4 * 2**20}
"""How much of the gathered matrix exists at a time: what a core's cache holds. Elsewhere, one GiB."""


def _extend(rows: Tensor, outside: float = 0.0) -> Tensor:
    """Appends what the last two row numbers of a table stand for: a masked position, and one outside."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1]), rows.new_full((1, rows.shape[1]), outside)])


def _chunks(rows: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Reads rows by number, piece by piece: yields which output rows, and their `[m, taps · C]`."""
    extended = _extend(rows)
    row_bytes = table.shape[1] * rows.shape[1] * rows.element_size()
    size = max(256, _CHUNK_BYTES.get(rows.device.type, 2**30) // row_bytes)
    for start in range(0, table.shape[0], size):
        part = slice(start, start + size)
        yield part, F.embedding(table[part], extended).flatten(1)


def multiply_rows(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of `[m, k]` rows and a matrix `[out, k]`, by the faster of two kernels.

    In float32 on CPUs, PyTorch multiplies by MKL; oneDNN, which it convolves by, is a third faster where
    MKL is not at home (AMD) and as fast elsewhere. A 1×1 convolution over all rows as one image gets us there.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.shape[0] >= 512:
        # Strides matter: as views of `[1, m, 1, k]`, image and result are channels-last, and nothing is copied.
        image = rows.view(1, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)  # [1, k, m, 1]
        out = F.conv2d(image, matrix.view(*matrix.shape, 1, 1), bias)  # [1, out, m, 1]
        return out.permute(0, 2, 3, 1).reshape(-1, matrix.shape[0])
    return F.linear(rows, matrix, bias)


def _product(rows: Tensor, table: Tensor, matrix: Tensor) -> Tensor:
    """The gathered rows times a matrix `[out, taps · C]`: `[m, out]`."""
    parts = [multiply_rows(gathered, matrix) for _, gathered in _chunks(rows, table)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Adds up tensors, those of half precision in float32."""
    first = next(parts)
    total: Tensor | None = None
    for part in parts:
        if total is None:
            total = first.to(torch.promote_types(first.dtype, torch.float32))
        total += part
    return first if total is None else total.to(first.dtype)


class _GatherConvolution(torch.autograd.Function):
    """`[R, C]` rows and a weight `[out, C, *kernel]` to `[m, out]` rows; the gathered matrix is not kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, patches: PatchLayout, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.patches, ctx.geometry = patches, geometry
        table = patches.table(geometry.block, geometry.stride, geometry.taps)
        matrix = weight.to(rows.dtype).movedim(1, -1).flatten(1)  # [out, taps · C]
        out = _product(rows, table, matrix)
        # Not a view, or the network could not work on it in place; this shares its memory, and nothing else.
        return out.new_empty(0).set_(out)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        patches, geometry = ctx.patches, ctx.geometry
        grad = grads[0].contiguous()  # [m, out]
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = _convolution_input_grad(grad, weight.to(grad.dtype), patches, geometry)
        if ctx.needs_input_grad[1]:
            table = patches.table(geometry.block, geometry.stride, geometry.taps)
            products = (grad[part].t() @ gathered for part, gathered in _chunks(rows, table))
            matrix = _sum(products)  # [out, taps · C]
            matrix = matrix.to(weight.dtype).view(weight.shape[0], *geometry.kernel, weight.shape[1])
            grad_weight = matrix.movedim(-1, 1)
        return grad_rows, grad_weight, None, None


def _convolution_input_grad(grad: Tensor, weight: Tensor, patches: PatchLayout, geometry: Geometry) -> Tensor:
    """Gradient to the input rows, by the mirrored tables: each input row gathers the output rows that read it.

    Input positions with the same remainder modulo the stride are read by the same taps, so there is one
    gather and one matrix product for each remainder (a single one at stride 1).
    """
    taps = weight.movedim(1, -1)  # [out, *kernel, C]
    unstrided = math.prod(geometry.stride) == 1
    grad_rows = grad.new_zeros(0 if unstrided else patches.num_visible, *geometry.block, weight.shape[1])
    for remainder in itertools.product(*(range(step) for step in geometry.stride)):
        used: list[list[int]] = []
        offsets: list[tuple[int, ...]] = []
        for r, step, offsets_of_axis in zip(remainder, geometry.stride, geometry.taps, strict=True):
            used.append([tap for tap, offset in enumerate(offsets_of_axis) if (r - offset) % step == 0])
            offsets.append(tuple((r - offsets_of_axis[tap]) // step for tap in used[-1]))
        if not all(used):
            continue  # positions that no window reads
        table = patches.table(geometry.out_block, (1,) * patches.rank, tuple(offsets))
        selected = taps
        for axis, (chosen, size) in enumerate(zip(used, geometry.kernel, strict=True), start=1):
            if len(chosen) < size:
                selected = selected.index_select(axis, torch.tensor(chosen, device=taps.device))
        matrix = selected.movedim(-1, 0).movedim(1, -1).flatten(1)  # [C, taps · out]
        part = _product(grad, table, matrix).view(patches.num_visible, *geometry.out_block, -1)
        if unstrided:
            return part.flatten(0, -2)
        grad_rows[(slice(None), *(slice(r, None, s) for r, s in zip(remainder, geometry.stride, strict=True)))] = part
    return grad_rows.flatten(0, -2)


def gather_convolution(rows: Tensor, weight: Tensor, patches: PatchLayout, geometry: Geometry) -> Tensor:
    """Convolution over visible positions as one gather and one matrix product.

    Args:
        rows: `[n · prod(block), C]`, the input map's rows.
        weight: `[out, C, *kernel]`; may be of higher precision than the rows. It is rounded to theirs where it
            is used, so that no copy waits for the backward pass.
        patches: the layout.
        geometry: how the kernel slides.

    Returns:
        `[n · prod(block / stride), out]`, the output map's rows.
    """
    out: Tensor = _GatherConvolution.apply(rows, weight, patches, geometry)
    return out


class _GatherWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, patches: PatchLayout, block: tuple[int, ...], start: Sequence[int],
        length: Sequence[int], outside: float,
    ) -> Tensor:  # fmt: skip
        ctx.patches, ctx.block, ctx.start, ctx.length = patches, block, start, length
        taps = tuple(tuple(range(first, first + size)) for first, size in zip(start, length, strict=True))
        table = patches.table(block, block, taps)  # one window per patch: [n, prod(length)]
        windows = F.embedding(table, _extend(rows, outside))
        return windows.view(patches.num_visible, *length, rows.shape[1]).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        patches, block = ctx.patches, ctx.block
        grad = grads[0].movedim(1, -1)  # [n, *length, C]
        grad_rows = grad.new_zeros(patches.num_visible, *block, grad.shape[-1])
        # A patch appears in the window of every patch around it: add up its part of each.
        reach = [
            range(-((first + size - 1) // extent), -(first // extent) + 1)
            for first, size, extent in zip(ctx.start, ctx.length, block, strict=True)
        ]
        for delta in itertools.product(*reach):
            into: list[slice] = [slice(None)]
            out_of: list[slice] = [slice(None)]
            for cells, first, size, extent in zip(delta, ctx.start, ctx.length, block, strict=True):
                offset = -cells * extent - first  # window position of the patch's first position
                low, high = max(0, -offset), min(extent, size - offset)
                into.append(slice(low, high))
                out_of.append(slice(low + offset, high + offset))
            if any(part.start >= part.stop for part in into[1:]):
                continue
            if any(delta):
                part = grad[tuple(out_of)]
                part = torch.cat([part, part.new_zeros(2, *part.shape[1:])])  # masked or outside: zero
                grad_rows[tuple(into)] += part.index_select(0, patches.neighbours(delta))
            else:
                grad_rows[tuple(into)] += grad[tuple(out_of)]
        return grad_rows.flatten(0, -2), None, None, None, None, None


def gather_windows(
    rows: Tensor,
    patches: PatchLayout,
    block: tuple[int, ...],
    start: Sequence[int],
    length: Sequence[int],
    outside: float = 0.0,
) -> Tensor:
    """Every patch with its surroundings, as a batch of small images.

    Args:
        rows: `[n · prod(block), C]`.
        patches: the layout.
        block: positions per patch along each axis.
        start: first position of the window relative to the patch's, per axis; negative for a halo before it.
        length: size of the window, per axis.
        outside: value beyond the image's border. Masked positions are zero.

    Returns:
        `[n, C, *length]` in channels-last memory.
    """
    windows: Tensor = _GatherWindows.apply(rows, patches, block, tuple(start), tuple(length), outside)
    return windows
