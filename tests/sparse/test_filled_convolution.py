"""Convolution of a packed map, filled at hidden positions, against the dense convolution."""

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, examples, masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparkmim.errors import UserError
from sparkmim.sparse import PatchLayout, filled_convolution, pack, unpack

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@given(masks(), st.data())
@examples(60)
def test_equals_the_dense_convolution(visible: Tensor, data: st.DataObject) -> None:
    rank = visible.ndim - 1
    block = data.draw(st.lists(st.integers(1, 3 if rank < 3 else 2), min_size=rank, max_size=rank))
    kernel = data.draw(st.lists(st.sampled_from([1, 3, 5]), min_size=rank, max_size=rank))
    channels, out, biased = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    torch.manual_seed(0)
    layout = PatchLayout(visible)
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], block, strict=True)]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, fill, weight = leaf(len(visible), channels, *sizes), leaf(1, channels, *[1] * rank), leaf(out, channels, *kernel)
    leaves = [x, fill, weight, *([leaf(out)] if biased else [])]
    bias = leaves[3] if biased else None
    found = filled_convolution(pack(x, layout), fill, weight, bias)
    expected = CONVOLUTIONS[rank](
        unpack(pack(x, layout), fill), weight, bias, padding=tuple(size // 2 for size in kernel)
    )
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    visible = torch.tensor([[[True, False], [False, True]]])
    x, fill, weight = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 1, 1), torch.randn(4, 8, 3, 3) / math.sqrt(72)
    packed = pack(x, PatchLayout(visible))
    with torch.autocast("cpu", dtype):
        found = filled_convolution(packed, fill, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), filled_convolution(packed, fill, weight), rtol=0.02, atol=0.02)


def test_memory_is_channels_last() -> None:
    visible = torch.tensor([[[True, False], [False, True]]])
    packed = pack(torch.randn(1, 3, 8, 8), PatchLayout(visible))
    found = filled_convolution(packed, torch.zeros(1, 3, 1, 1), torch.randn(4, 3, 3, 3))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_even_kernel_has_no_centre() -> None:
    packed = pack(torch.randn(1, 3, 8, 8), PatchLayout(torch.ones(1, 2, 2, dtype=torch.bool)))
    with pytest.raises(UserError, match=r"the kernel \[2, 3\] has no centre; its sizes must be odd"):
        filled_convolution(packed, torch.zeros(1, 3, 1, 1), torch.randn(4, 3, 2, 3))
