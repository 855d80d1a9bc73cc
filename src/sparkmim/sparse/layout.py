"""Layout of the visible patches of a batch: their positions, neighbours and index tables."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparkmim.errors import UserError

Taps = tuple[tuple[int, ...], ...]
"""Offsets at which an operation reads along each spatial axis, relative to `stride · output position`."""


class PatchLayout:
    """Visible patches of a batch of images, with index tables of their neighbours.

    The visible patches of the batch are numbered `0 … n-1`, sample by sample and in row-major order
    within a sample. A layout depends on the mask alone: it is built once per step and shared by all
    layers of a network. Tables are built on first use and cached.

    Args:
        visible: bool `[B, *grid]`, true for visible patches. The grid has 1 axis for signals,
            2 for images, 3 for volumes.

    Raises:
        ValueError: if `visible` is not boolean, has no grid axis, or hides a whole sample.

    Example:
        >>> layout = PatchLayout(torch.tensor([[[True, False], [False, True]]]))
        >>> layout.grid, layout.num_visible, layout.counts
        ((2, 2), 2, (2,))
    """

    def __init__(self, visible: Tensor) -> None:
        if visible.dtype != torch.bool:
            raise UserError(f"visible must be a boolean mask, not {visible.dtype}")
        if visible.ndim < 2:
            raise UserError(f"visible must have the shape [batch, *grid], not {list(visible.shape)}")
        self.visible = visible
        self.batch_size = visible.shape[0]
        self.grid = tuple(visible.shape[1:])
        self.counts: tuple[int, ...] = tuple(visible.flatten(1).sum(1).tolist())
        if min(self.counts) == 0:
            raise UserError(f"sample {self.counts.index(0)} has no visible patch; show at least one")
        index = visible.nonzero()  # [n, 1 + rank], sorted by sample
        self.num_visible = index.shape[0]
        self.sample = index[:, 0]  # [n]
        self.position = index[:, 1:]  # [n, rank]
        self.index = index.unbind(1)  # indexes a tensor [B, *grid, …]
        self._slot = visible.new_full(visible.shape, self.num_visible, dtype=torch.long)  # [B, *grid]
        self._slot[self.index] = torch.arange(self.num_visible, device=visible.device)
        self._neighbours: dict[tuple[int, ...], Tensor] = {}
        self._tables: dict[tuple[tuple[int, ...], tuple[int, ...], Taps], Tensor] = {}

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.grid)

    @functools.cached_property
    def samples(self) -> tuple[PatchLayout, ...]:
        """A separate layout for each sample."""
        return tuple(PatchLayout(visible) for visible in torch.split(self.visible, 1))

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same number of visible patches."""
        return min(self.counts) == max(self.counts)

    def __repr__(self) -> str:
        shown = f"{self.num_visible} of {self.visible.numel()}"
        return f"PatchLayout(batch_size={self.batch_size}, grid={self.grid}, visible={shown})"

    def upsampled(self, block: Sequence[int]) -> Tensor:
        """Returns the mask with `block` positions per patch: bool `[B, *(grid · block)]`."""
        mask = self.visible
        for axis, size in enumerate(block, start=1):
            mask = mask.repeat_interleave(size, dim=axis)
        return mask

    def neighbours(self, delta: tuple[int, ...]) -> Tensor:
        """Returns the number of the patch `delta` grid cells away from each visible patch: long `[n]`.

        The number is `n` for a masked patch and `n + 1` outside the image.
        """
        if delta not in self._neighbours:
            grid = self.position.new_tensor(self.grid)
            target = self.position + self.position.new_tensor(delta)  # [n, rank]
            inside = ((target >= 0) & (target < grid)).all(1)
            clamped = torch.minimum(target.clamp(min=0), grid - 1)
            slot = self._slot[(self.sample, *clamped.unbind(1))]
            self._neighbours[delta] = torch.where(inside, slot, self.num_visible + 1)
        return self._neighbours[delta]

    def table(self, block: tuple[int, ...], stride: tuple[int, ...], taps: Taps) -> Tensor:
        """Which input row every tap of every output row reads: int32 `[n · prod(block/stride), prod(taps)]`.

        The rows of a packed map are its positions in memory order: patch, then position in the
        patch, row-major. Along each axis, output position `o` of a patch reads the input positions
        `o · stride + t` for each `t` in `taps`, counted from the patch's first position; positions
        beyond the patch belong to its neighbours. With `R = n · prod(block)` input rows, row `R`
        stands for a masked position and row `R + 1` for one outside the image.
        """
        key = (block, stride, taps)
        if key not in self._tables:
            self._tables[key] = self._build_table(block, stride, taps)
        return self._tables[key]

    def _build_table(self, block: tuple[int, ...], stride: tuple[int, ...], taps: Taps) -> Tensor:
        reach, which, where = _pattern(block, stride, taps, self.sample.device)
        around = torch.stack([self.neighbours(delta) for delta in itertools.product(*reach)], 1)  # [n, cells]
        patch = around.to(torch.int32)[:, which]  # [n, out · taps]
        inputs = math.prod(block)
        special = self.num_visible * inputs - self.num_visible  # patch number n to row number R
        table = torch.where(patch < self.num_visible, patch * inputs + where, patch + special)
        outputs = math.prod(size // step for size, step in zip(block, stride, strict=True))
        return table.view(self.num_visible * outputs, -1)


@functools.lru_cache(maxsize=256)
def _pattern(
    block: tuple[int, ...], stride: tuple[int, ...], taps: Taps, device: torch.device
) -> tuple[list[range], Tensor, Tensor]:
    """Computes where the taps of one patch read; the same for every patch of every layout.

    Returns:
        The offsets in grid cells of the patches read, per axis; and, for each output position and tap in row-major
        order, which of these patches is read (long `[out · taps]`) and at which position (int32 `[out · taps]`).
    """
    rank = len(block)
    reads = [
        torch.arange(size // step)[:, None] * step + torch.tensor(offsets)  # [out, taps]
        for size, step, offsets in zip(block, stride, taps, strict=True)
    ]
    cells = [torch.div(read, size, rounding_mode="floor") for read, size in zip(reads, block, strict=True)]
    reach = [range(int(cell.min()), int(cell.max()) + 1) for cell in cells]
    which = where = torch.zeros((), dtype=torch.long)
    for read, cell, cells_of_axis, size in zip(reads, cells, reach, block, strict=True):
        which = which[..., None, None] * len(cells_of_axis) + (cell - cells_of_axis.start)
        where = where[..., None, None] * size + read.remainder(size)
    # [out_1, taps_1, out_2, taps_2, …] -> [out_1, out_2, …, taps_1, taps_2, …]
    order = [2 * axis for axis in range(rank)] + [2 * axis + 1 for axis in range(rank)]
    return reach, which.permute(order).flatten().to(device), where.permute(order).flatten().to(device, torch.int32)
