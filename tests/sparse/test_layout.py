"""Layouts against brute force: neighbours, upsampled masks and index tables."""

import itertools
import math

import pytest
import torch
from agreement import examples, masks, random_mask, upsample
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparkmim.sparse import PatchLayout


@given(masks())
@examples(40)
def test_patches_are_numbered_row_major(visible: Tensor) -> None:
    layout = PatchLayout(visible)
    cells = [(b, *c) for b in range(visible.shape[0]) for c in itertools.product(*map(range, visible.shape[1:]))]
    expected = [cell for cell in cells if visible[cell]]
    assert list(zip(*(index.tolist() for index in layout.index), strict=True)) == expected
    hidden = [number for number, cell in enumerate(cells) if not visible[cell]]
    assert layout.hidden.tolist() == hidden
    assert layout.num_visible == len(expected) == sum(layout.counts)
    assert layout.counts == tuple(sum(cell[0] == b for cell in expected) for b in range(visible.shape[0]))
    assert layout.uniform == (len(set(layout.counts)) == 1)
    assert layout.rank == visible.ndim - 1


@given(masks(), st.lists(st.integers(-2, 2), min_size=3, max_size=3))
@examples(60)
def test_neighbours(visible: Tensor, delta: list[int]) -> None:
    layout = PatchLayout(visible)
    grid = tuple(visible.shape[1:])
    numbers = {tuple(cell): n for n, cell in enumerate(visible.nonzero().tolist())}
    for (sample, *cell), found in zip(
        visible.nonzero().tolist(), layout.neighbours(tuple(delta[: layout.rank])).tolist(), strict=True
    ):
        target = [at + step for at, step in zip(cell, delta, strict=False)]
        inside = all(0 <= at < size for at, size in zip(target, grid, strict=True))
        expected = numbers.get((sample, *target), layout.num_visible) if inside else layout.num_visible + 1
        assert found == expected


@given(masks(), st.data())
@examples(100)
def test_table_reads_what_a_dense_map_holds(visible: Tensor, data: st.DataObject) -> None:
    rank = visible.ndim - 1
    stride = tuple(data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    out = data.draw(st.lists(st.integers(1, 3 if rank < 3 else 2), min_size=rank, max_size=rank))
    block = tuple(size * step for size, step in zip(out, stride, strict=True))
    offsets = st.lists(st.integers(-5, 5), min_size=1, max_size=3)
    taps = tuple(tuple(data.draw(offsets)) for _ in range(rank))
    layout = PatchLayout(visible)
    table = layout.table(block, stride, taps)
    assert table.dtype == torch.int32

    # A dense map that holds row numbers, and one past the end where masked.
    rows = layout.num_visible * math.prod(block)
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], block, strict=True)]
    numbers = torch.full((visible.shape[0], *sizes), rows)
    for patch, (sample, *cell) in enumerate(visible.nonzero().tolist()):
        for row, inner in enumerate(itertools.product(*map(range, block))):
            where = [at * size + i for at, size, i in zip(cell, block, inner, strict=True)]
            numbers[(sample, *where)] = patch * math.prod(block) + row
    expected = []
    for sample, *cell in visible.nonzero().tolist():
        for position in itertools.product(*map(range, out)):
            for tap in itertools.product(*taps):
                where = [
                    at * size + o * step + t
                    for at, size, o, step, t in zip(cell, block, position, stride, tap, strict=True)
                ]
                inside = all(0 <= at < size for at, size in zip(where, sizes, strict=True))
                expected.append(int(numbers[(sample, *where)]) if inside else rows + 1)
    assert table.flatten().tolist() == expected
    assert table.shape == (layout.num_visible * math.prod(out), math.prod(map(len, taps)))


def test_tables_are_shared() -> None:
    layout = PatchLayout(random_mask(2, (3, 3)))
    taps = ((-1, 0, 1),) * 2
    assert layout.table((4, 4), (1, 1), taps) is layout.table((4, 4), (1, 1), taps)
    assert layout.table((4, 4), (2, 2), taps) is not layout.table((4, 4), (1, 1), taps)
    assert layout.neighbours((0, 1)) is layout.neighbours((0, 1))


@given(masks(), st.lists(st.integers(1, 3), min_size=3, max_size=3))
@examples(20)
def test_upsampled(visible: Tensor, block: list[int]) -> None:
    block = block[: visible.ndim - 1]
    assert torch.equal(PatchLayout(visible).upsampled(block), upsample(visible, block))


def test_repr() -> None:
    layout = PatchLayout(torch.tensor([[[True, False], [True, True]]]))
    assert repr(layout) == "PatchLayout(batch_size=1, grid=(2, 2), visible=3 of 4)"


def test_refuses_what_is_no_mask() -> None:
    with pytest.raises(ValueError, match=r"must be a boolean mask, not torch\.float32"):
        PatchLayout(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"shape \[batch, \*grid\], not \[4\]"):
        PatchLayout(torch.ones(4, dtype=torch.bool))
    visible = torch.ones(3, 2, 2, dtype=torch.bool)
    visible[1] = False
    with pytest.raises(ValueError, match="sample 1 has no visible patch"):
        PatchLayout(visible)
