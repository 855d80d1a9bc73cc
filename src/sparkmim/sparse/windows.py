"""Convolution with few channels per group, and pooling, by dense kernels on ordinary images.

The images are either windows, each patch with its halo, or the whole maps of the samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.sparse.gather import Geometry, added, chunk_size, extend, owner
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.packed import from_rows, gather_patches, scatter_patches, to_rows

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _window_table(patches: PatchLayout, block: tuple[int, ...], start: Sequence[int], length: Sequence[int]) -> Tensor:
    """Returns the rows in the window of each patch: int32 `[n, prod(length)]`."""
    taps = tuple(tuple(range(first, first + size)) for first, size in zip(start, length, strict=True))
    return patches.table(block, block, taps)


def _read_windows(
    rows: Tensor, patches: PatchLayout, block: tuple[int, ...], start: Sequence[int], length: Sequence[int],
    outside: float = 0.0,
) -> Tensor:  # fmt: skip
    """Gathers rows `[R, C]` into windows `[n, C, *length]` in channels-last memory."""
    windows = F.embedding(_window_table(patches, block, start, length), extend(rows, outside))
    return from_rows(windows.flatten(0, -2), patches.num_visible, length)


def _add_windows(
    windows: Tensor, patches: PatchLayout, block: tuple[int, ...], start: Sequence[int], length: Sequence[int]
) -> Tensor:
    """Sums windows `[n, C, *length]` into rows `[R, C]`: the adjoint of `_read_windows`.

    A patch appears in the windows of its neighbours: its part of each window is gathered and added.
    """
    values = windows.movedim(1, -1)  # [n, *length, C]
    total = values.new_zeros(patches.num_visible, *block, values.shape[-1])
    reach = [
        range(-((first + size - 1) // extent), -(first // extent) + 1)
        for first, size, extent in zip(start, length, block, strict=True)
    ]
    for delta in itertools.product(*reach):
        into: list[slice] = [slice(None)]
        out_of: list[slice] = [slice(None)]
        for cells, first, size, extent in zip(delta, start, length, block, strict=True):
            offset = -cells * extent - first  # window position of the patch's first position
            low, high = max(0, -offset), min(extent, size - offset)
            into.append(slice(low, high))
            out_of.append(slice(low + offset, high + offset))
        if any(part.start >= part.stop for part in into[1:]):
            continue
        part = values[tuple(out_of)]
        if any(delta):
            part = torch.cat([part, part.new_zeros(2, *part.shape[1:])])  # masked or outside: zero
            part = part.index_select(0, patches.neighbours(delta))
        total[tuple(into)] += part
    return total.flatten(0, -2)


class _GatherWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, patches: PatchLayout, block: tuple[int, ...], start: Sequence[int],
        length: Sequence[int], outside: float,
    ) -> Tensor:  # fmt: skip
        ctx.patches, ctx.block, ctx.start, ctx.length = patches, block, start, length
        return _read_windows(rows, patches, block, start, length, outside)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return _add_windows(grads[0], ctx.patches, ctx.block, ctx.start, ctx.length), None, None, None, None, None


def gather_windows(
    rows: Tensor,
    patches: PatchLayout,
    block: tuple[int, ...],
    start: Sequence[int],
    length: Sequence[int],
    outside: float = 0.0,
) -> Tensor:
    """Cuts out a window around every patch: a batch of small images.

    Args:
        rows: `[n · prod(block), C]`.
        patches: layout of the `n` visible patches.
        block: positions per patch, per axis.
        start: first position of the window relative to the patch, per axis; negative for a halo.
        length: size of the window, per axis.
        outside: value beyond the image's border. Masked positions are zero.

    Returns:
        `[n, C, *length]` in channels-last memory.
    """
    windows: Tensor = _GatherWindows.apply(rows, patches, block, tuple(start), tuple(length), outside)
    return windows


class _Windows:
    """Images that are patches with their halo. All methods are linear; the `_grad` methods are the adjoints."""

    def __init__(self, patches: PatchLayout, geometry: Geometry) -> None:
        self.patches, self.geometry = patches, geometry
        self.start, self.length = geometry.span
        self.padding = (0,) * patches.rank

    @property
    def positions(self) -> int:
        """Number of positions in all images."""
        return self.patches.num_visible * math.prod(self.length)

    def images(self, rows: Tensor) -> Tensor:
        return _read_windows(rows, self.patches, self.geometry.block, self.start, self.length)

    def images_grad(self, grad: Tensor) -> Tensor:
        return _add_windows(grad, self.patches, self.geometry.block, self.start, self.length)

    def results(self, out: Tensor) -> Tensor:
        return to_rows(out)

    def results_grad(self, grad: Tensor) -> Tensor:
        return from_rows(grad, self.patches.num_visible, self.geometry.out_block)


class _Maps:
    """Images that are whole maps of samples, zero where masked. The methods are those of `_Windows`."""

    def __init__(self, patches: PatchLayout, geometry: Geometry) -> None:
        self.patches, self.geometry = patches, geometry
        self.size = [cells * extent for cells, extent in zip(patches.grid, geometry.block, strict=True)]
        axes = zip(geometry.kernel, geometry.dilation, geometry.stride, geometry.padding, strict=True)
        after = [dilation * (kernel - 1) + 1 - stride - before for kernel, dilation, stride, before in axes]
        # Dense kernels pad alike before and after. Where that would change the output's size, the images are padded.
        lopsided = any(
            a > b or b - a >= step for a, b, step in zip(after, geometry.padding, geometry.stride, strict=True)
        )
        self.padding = (0,) * patches.rank if lopsided else geometry.padding
        self.border = [(b, max(a, 0)) for a, b in zip(after, geometry.padding, strict=True)] if lopsided else []

    @property
    def positions(self) -> int:
        """Number of positions in all images."""
        return self.patches.batch_size * math.prod(self.size)

    def images(self, rows: Tensor) -> Tensor:
        values = rows.view(self.patches.num_visible, *self.geometry.block, -1)
        maps = scatter_patches(values, self.patches).movedim(-1, 1)
        return F.pad(maps, [size for pair in reversed(self.border) for size in pair]) if self.border else maps

    def images_grad(self, grad: Tensor) -> Tensor:
        for axis, ((before, _), size) in enumerate(zip(self.border, self.size, strict=False), start=2):
            grad = grad.narrow(axis, before, size)
        return to_rows(gather_patches(grad, self.patches))

    def results(self, out: Tensor) -> Tensor:
        return to_rows(gather_patches(out, self.patches))

    def results_grad(self, grad: Tensor) -> Tensor:
        values = grad.view(self.patches.num_visible, *self.geometry.out_block, -1)
        return scatter_patches(values, self.patches).movedim(-1, 1)


class _ImageConvolution(torch.autograd.Function):
    """Convolves rows `[R, C]` by a weight `[out, C / groups, *kernel]` to rows `[m, out]`; images are not stored."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, patches: PatchLayout, geometry: Geometry,
        groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, weight)
        windows, maps = _Windows(patches, geometry), _Maps(patches, geometry)
        ctx.form = form = windows if windows.positions <= maps.positions else maps
        ctx.groups = groups
        images = form.images(rows)
        ctx.images_like = images.shape, images.stride()
        out = _CONVOLUTIONS[patches.rank](
            images, weight.to(rows.dtype), bias, geometry.stride, form.padding, geometry.dilation, groups
        )
        return owner(form.results(out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        form, geometry = ctx.form, ctx.form.geometry
        of_rows, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = grads[0].contiguous()
        grad_rows = grad_weight = None
        if of_weight and rows.device.type == "cpu" and ctx.groups == weight.shape[0] == rows.shape[1]:
            grad_weight = _depthwise_weight_grad(rows, grad, form.patches, geometry).to(weight.dtype)
            of_weight = False
        if of_rows or of_weight:
            dtype = _backward_dtype(rows, ctx.groups, geometry)
            # For the input's gradient alone, the kernel needs only the shape of the images.
            images = form.images(rows) if of_weight else rows.new_empty_strided(*ctx.images_like, dtype=dtype)
            grad_images, grad_dense, _ = torch.ops.aten.convolution_backward(
                form.results_grad(grad).to(dtype), images.to(dtype), weight.to(dtype), None, geometry.stride,
                form.padding, geometry.dilation, False, (0,) * form.patches.rank, ctx.groups,
                (of_rows, of_weight, False),
            )  # fmt: skip
            grad_rows = form.images_grad(grad_images.to(rows.dtype)) if of_rows else None
            grad_weight = grad_dense.to(weight.dtype) if of_weight else grad_weight
        return grad_rows, grad_weight, grad.sum(0) if of_bias else None, None, None, None


def _backward_dtype(rows: Tensor, groups: int, geometry: Geometry) -> torch.dtype:
    """Returns the dtype of the backward pass: float32 for strided depthwise convolution in bfloat16 on CPUs.

    In bfloat16 it takes 20 to 120 times as long, measured on an AMD EPYC (`benchmarks/depthwise.py`,
    `results/depthwise.json`).
    """
    slow = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and groups == rows.shape[1]
    return torch.float32 if slow and max(geometry.stride) > 1 else rows.dtype


def _depthwise_weight_grad(rows: Tensor, grad: Tensor, patches: PatchLayout, geometry: Geometry) -> Tensor:
    """Computes the gradient `[C, 1, *kernel]` of a depthwise weight: `Σ rows[o · stride + t · dilation] · grad[o]`.

    As a function of the tap `t`, this is another depthwise convolution: the image is each patch's window, the kernel
    its gradient, and stride and dilation are swapped. PyTorch's CPU backward takes several times as long at 7×7.
    """
    start, length = geometry.span
    table = _window_table(patches, geometry.block, start, length)  # [n, prod(length)]
    extended = extend(rows)
    channels = rows.shape[1]
    kernels = grad.view(patches.num_visible, *geometry.out_block, channels).movedim(-1, 1)  # [n, C, *out_block]
    convolution = _CONVOLUTIONS[patches.rank]
    total: Tensor | None = None
    size = chunk_size(table.shape[1] * channels * rows.element_size(), rows.device)
    for first in range(0, patches.num_visible, size):
        kernel = kernels[first : first + size].flatten(0, 1).unsqueeze(1)  # [p · C, 1, *out_block]
        windows = F.embedding(table[first : first + size].t(), extended)  # [prod(length), p, C]
        image = windows.view(1, *length, -1).movedim(-1, 1)  # [1, p · C, *length]
        out = convolution(image, kernel, None, geometry.dilation, 0, geometry.stride, kernel.shape[0])
        total = added(total, out.movedim(1, -1).view(*geometry.kernel, -1, channels).sum(-2))
    assert total is not None
    return total.movedim(-1, 0).unsqueeze(1)  # [C, 1, *kernel]


def image_convolution(
    rows: Tensor, weight: Tensor, patches: PatchLayout, geometry: Geometry, groups: int, bias: Tensor | None = None
) -> Tensor:
    """Convolves visible positions by the dense kernel, on windows or whole maps, whichever is smaller.

    Args:
        rows: rows of the input map, `[n · prod(block), C]`.
        weight: `[out, C / groups, *kernel]`. Cast to the rows' dtype where it is used.
        patches: layout of the `n` visible patches.
        geometry: of the sliding kernel.
        groups: number of channel groups.
        bias: `[out]`, in the rows' dtype.

    Returns:
        Rows of the output map, `[n · prod(block / stride), out]`.
    """
    out: Tensor = _ImageConvolution.apply(rows, weight, bias, patches, geometry, groups)
    return out
