"""Visible patches of a batch and the neighbours of each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.errors import UserError

Taps = tuple[tuple[int, ...], ...]
"""Per spatial axis, the offsets at which an operation reads, relative to `stride * output position`."""


class PatchLayout:
    """The visible patches of a batch of images, with index tables of their neighbours.

    All visible patches of the batch are numbered `0 … n-1`, sample by sample and in row-major order
    within a sample. Everything here depends on the mask alone: a layout is built once per step, and
    all layers of a network share its tables, which are built on first use and kept.

    The mask is read where it lies: one on the CPU costs a GPU no synchronisation.

    Args:
        visible: bool `[B, *grid]`, true where a patch is visible. The number of grid axes is the
            spatial rank: 1 for signals, 2 for images, 3 for volumes.
        device: of the index tensors and thus of the images; None for that of `visible`.

    Attributes:
        visible: bool `[B, *grid]` on `device`.
        counts: number of visible patches of each sample.
        sample: long `[n]`, the sample of each visible patch.
        index: `sample` and the patch's grid cell along each axis, `[n]` each, to index a tensor `[B, *grid, …]`.
        hidden: long `[B · patches - n]`, row-major numbers of the hidden patches in the batch.

    Raises:
        ValueError: if `visible` is not boolean, has no grid axis, or hides a whole sample.

    Example:
        >>> layout = PatchLayout(torch.tensor([[[True, False], [False, True]]]))
        >>> layout.grid, layout.num_visible, layout.counts
        ((2, 2), 2, (2,))
    """

    def __init__(self, visible: Tensor, device: torch.device | str | None = None) -> None:
        if visible.dtype != torch.bool:
            raise UserError(f"visible must be a boolean mask, not {visible.dtype}")
        if visible.ndim < 2:
            raise UserError(f"visible must have the shape [batch, *grid], not {list(visible.shape)}")
        self._mask = visible  # on its own device
        self.batch_size = visible.shape[0]
        self.grid = tuple(visible.shape[1:])
        self.counts: tuple[int, ...] = tuple(visible.flatten(1).sum(1).tolist())
        if min(self.counts) == 0:
            raise UserError(f"sample {self.counts.index(0)} has no visible patch; show at least one")
        index = visible.nonzero()  # [n, 1 + rank], sorted by sample
        hidden = (~visible).flatten().nonzero().squeeze(1)
        device = visible.device if device is None else device
        # The other way, from a GPU to the CPU, a copy that nobody waits for would be read too early.
        self.visible, index, self.hidden = (
            tensor.to(device, non_blocking=visible.is_cpu) for tensor in (visible, index, hidden)
        )
        self.num_visible = index.shape[0]
        self.index = index.unbind(1)
        self.sample = self.index[0]
        self._slot = index.new_full(visible.shape, self.num_visible)  # [B, *grid]
        self._slot[self.index] = torch.arange(self.num_visible, device=index.device)
        self._neighbours: dict[tuple[int, ...], Tensor] = {}
        self._tables: dict[tuple[object, ...], Tensor] = {}

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.grid)

    @functools.cached_property
    def samples(self) -> tuple[PatchLayout, ...]:
        """One layout per sample."""
        return tuple(PatchLayout(visible, self.visible.device) for visible in torch.split(self._mask, 1))

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same number of visible patches."""
        return min(self.counts) == max(self.counts)

    def __repr__(self) -> str:
        shown = f"{self.num_visible} of {self.visible.numel()}"
        return f"PatchLayout(batch_size={self.batch_size}, grid={self.grid}, visible={shown})"

    def upsampled(self, block: Sequence[int]) -> Tensor:
        """The mask at a resolution of `block` positions per patch: bool `[B, *(grid · block)]`."""
        mask = self.visible
        for axis, size in enumerate(block, start=1):
            mask = mask.repeat_interleave(size, dim=axis)
        return mask

    def neighbours(self, delta: tuple[int, ...]) -> Tensor:
        """Number of the patch `delta` grid cells away from each visible patch: long `[n]`.

        `n` stands for a hidden patch, `n + 1` for a cell outside the image.
        """
        if delta not in self._neighbours:
            inside = torch.ones_like(self.sample, dtype=torch.bool)
            cells: list[Tensor] = []
            for axis, step, count in zip(self.index[1:], delta, self.grid, strict=True):
                cell = axis + step
                clamped = cell.clamp(0, count - 1)
                inside &= cell == clamped
                cells.append(clamped)
            slot = self._slot[(self.sample, *cells)]
            self._neighbours[delta] = torch.where(inside, slot, self.num_visible + 1)
        return self._neighbours[delta]

    def table(self, block: tuple[int, ...], stride: tuple[int, ...], taps: Taps) -> Tensor:
        """Which input row every tap of every output row reads: int32 `[n · prod(block/stride), prod(taps)]`.

        The rows of a packed map are its positions in memory order: patch, then position in the
        patch, row-major. Output position `o` of a patch reads, along each axis, the input positions
        `o · stride + t` for `t` in that axis's `taps`, counted from the patch's own first position;
        those beyond the patch belong to its neighbours. With `R = n · prod(block)` input rows, row
        `R` stands for a masked position and row `R + 1` for one outside the image.
        """
        return self._kept(("table", block, stride, taps), lambda: self._build_table(block, stride, taps))

    def dense_table(self, block: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
        """Which input row every tap reads at every position of the dense map: int32 `[B · prod(S), prod(kernel)]`.

        The kernel is centred, with stride 1. Rows are numbered as in `table`: row `R` stands for a hidden position, row
        `R + 1` for one outside the image.
        """

        def build() -> Tensor:
            count = self.num_visible * math.prod(block)
            rows = self._positions(block).fill_(count)
            numbers = torch.arange(count, dtype=rows.dtype, device=rows.device).view(self.num_visible, *block, 1)
            self.by_patch(rows)[self.index] = numbers
            return self._windows(rows, kernel, count + 1).movedim(1, -1).flatten(0, -2)

        return self._kept(("dense", block, kernel), build)

    def readers(self, block: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
        """Which position of the dense map reads every row by every tap: int32 `[n · prod(block), prod(kernel)]`.

        The mirror of `dense_table`, for visible rows. Position `B · prod(S)` stands for one outside the image.
        """

        def build() -> Tensor:
            positions = self._positions(block)
            windows = self._windows(positions, kernel, positions.numel())
            return self.by_patch(windows.flip(1))[self.index].flatten(0, -2)  # tap t of position q reads row q + t

        return self._kept(("readers", block, kernel), build)

    def by_patch(self, dense: Tensor) -> Tensor:
        """Returns a view `[B, *grid, *block, C]` of a dense map `[B, C, *S]`."""
        split = dense
        for axis, cells in reversed(list(enumerate(self.grid, start=2))):
            split = torch.unflatten(split, axis, (cells, -1))  # [B, C, grid_1, block_1, grid_2, block_2, …]
        grid, block = range(2, 2 + 2 * self.rank, 2), range(3, 3 + 2 * self.rank, 2)
        return split.permute(0, *grid, *block, 1)

    def _positions(self, block: Sequence[int]) -> Tensor:
        """Returns the number of every position of the dense map: int32 `[B, 1, *S]`."""
        sizes = [cells * extent for cells, extent in zip(self.grid, block, strict=True)]
        count = self.batch_size * math.prod(sizes)
        return torch.arange(count, dtype=torch.int32, device=self.sample.device).view(-1, 1, *sizes)

    def _windows(self, positions: Tensor, kernel: Sequence[int], outside: int) -> Tensor:
        """Returns the centred window of every position, `[B, 1, *S]` to `[B, prod(kernel), *S]`."""
        windows = F.pad(positions, [size // 2 for size in reversed(kernel) for _ in range(2)], value=outside)
        for axis, size in enumerate(kernel, start=2):
            windows = windows.unfold(axis, size, 1)
        return windows.flatten(2 + self.rank).squeeze(1).movedim(-1, 1)

    def _kept(self, key: tuple[object, ...], build: Callable[[], Tensor]) -> Tensor:
        """Returns a table, built on first use."""
        if key not in self._tables:
            self._tables[key] = build()
        return self._tables[key]

    def _build_table(self, block: tuple[int, ...], stride: tuple[int, ...], taps: Taps) -> Tensor:
        reach, which, where = _pattern(block, stride, taps, self.sample.device)
        around = torch.stack([self.neighbours(delta) for delta in itertools.product(*reach)], 1)  # [n, cells]
        patch = around.to(torch.int32)[:, which]  # [n, out · taps]
        inputs = math.prod(block)
        special = self.num_visible * inputs - self.num_visible  # maps patch n to row R, n + 1 to R + 1
        table = torch.where(patch < self.num_visible, patch * inputs + where, patch + special)
        outputs = math.prod(size // step for size, step in zip(block, stride, strict=True))
        return table.view(self.num_visible * outputs, -1)


@functools.lru_cache(maxsize=256)
def _pattern(
    block: tuple[int, ...], stride: tuple[int, ...], taps: Taps, device: torch.device
) -> tuple[list[range], Tensor, Tensor]:
    """Where the taps of one patch read, the same for every patch of every layout.

    Returns:
        The range of grid offsets that are read along each axis; and for each output position and tap, row-major
        `[out · taps]`: which of these patches is read (long), and which position in it (int32).
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
