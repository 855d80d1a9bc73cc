"""Packing, unpacking and gathering: values, and gradients by finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, dense_of, examples, masks, random_mask, upsample
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from sparkmim.sparse import PackedTensor, PatchLayout, UnsupportedOperation, pack, register_rule, unpack
from sparkmim.sparse.gather import Geometry, gather_convolution, product
from sparkmim.sparse.packed import RULES, from_rows, to_rows
from sparkmim.sparse.windows import gather_windows, image_convolution

BLOCKS = st.lists(st.integers(1, 3), min_size=3, max_size=3)


def dense_map(visible: Tensor, block: list[int], channels: int = 2) -> Tensor:
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], block, strict=True)]
    return torch.randn(visible.shape[0], channels, *sizes, dtype=torch.float64)


@given(masks(), BLOCKS, st.booleans())
@examples(60)
def test_round_trip(visible: Tensor, block: list[int], channels_last: bool) -> None:
    block = block[: visible.ndim - 1]
    images = dense_map(visible, block)
    if channels_last:
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    layout = PatchLayout(visible)
    packed = pack(images, layout)
    mask = upsample(visible, block).unsqueeze(1)
    assert isinstance(packed, PackedTensor)
    assert packed.shape == images.shape
    assert packed.size() == images.shape
    assert len(packed) == visible.shape[0]
    assert packed.values.shape == (layout.num_visible, 2, *block)
    assert not isinstance(packed.values, PackedTensor)
    assert torch.equal(unpack(packed), images * mask)
    assert torch.equal(dense_of(packed)[0], images * mask)
    token = torch.randn(1, 2, *(1,) * len(block), dtype=torch.float64)
    assert torch.equal(unpack(packed, fill=token), torch.where(mask, images, token))
    other = torch.randn_like(images)
    assert torch.equal(unpack(packed, fill=other), torch.where(mask, images, other))
    assert torch.equal(from_rows(to_rows(packed.values), layout.num_visible, block), packed.values)


@given(masks(max_cells=2), BLOCKS)
@examples(15)
def test_gradients_of_pack_and_unpack(visible: Tensor, block: list[int]) -> None:
    block = block[: visible.ndim - 1]
    layout = PatchLayout(visible)
    images = dense_map(visible, block, channels=1).requires_grad_()
    token = torch.randn(1, 1, *(1,) * len(block), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: pack(x, layout).values, images)
    assert gradcheck(lambda x, fill: unpack(pack(x, layout), fill), (images, token))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Tensor, Geometry]:
    visible = draw(masks(max_cells=2))
    rank = visible.ndim - 1

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    stride, dilation = each(1, 3 if rank < 3 else 2), each(1, 2)
    kernel = each(1, 5 if rank == 1 else 3 if rank == 2 else 2)
    out = each(1, 2)
    block = tuple(size * step for size, step in zip(out, stride, strict=True))
    padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
    return visible, Geometry(block, kernel, stride, padding, dilation)


def dense_convolution(dense: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolves a dense map, padded so that the output size is the input size divided by the stride."""
    axes = list(zip(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True))
    pads = [(before, max(0, d * (k - 1) + 1 - s - before)) for k, s, before, d in axes]
    padded = F.pad(dense, [size for pair in reversed(pads) for size in pair])
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dense.ndim - 2]
    out = convolution(padded, weight, None, geometry.stride, 0, geometry.dilation)
    sizes = [size // step for size, step in zip(dense.shape[2:], geometry.stride, strict=True)]
    return out[(..., *(slice(size) for size in sizes))]


@given(geometries())
@examples(60)
def test_gather_convolution_is_a_convolution(case: tuple[Tensor, Geometry]) -> None:
    visible, geometry = case
    layout = PatchLayout(visible)
    images = dense_map(visible, list(geometry.block)) * upsample(visible, geometry.block).unsqueeze(1)
    weight = torch.randn(3, 2, *geometry.kernel, dtype=torch.float64)
    rows = gather_convolution(to_rows(pack(images, layout).values), weight, layout, geometry)
    ours = from_rows(rows, layout.num_visible, geometry.out_block)
    theirs = pack(dense_convolution(images, weight, geometry), layout).values
    assert_close(ours, theirs, "the convolution", 1e-12)


@given(geometries())
@examples(40)
def test_gradients_of_gather_convolution(case: tuple[Tensor, Geometry]) -> None:
    visible, geometry = case
    layout = PatchLayout(visible)
    rows = torch.randn(layout.num_visible * math.prod(geometry.block), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, *geometry.kernel, dtype=torch.float64, requires_grad=True)
    function = lambda rows, weight: gather_convolution(rows, weight, layout, geometry)  # noqa: E731
    assert gradcheck(function, (rows, weight), fast_mode=True)


def test_gather_convolution_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps are multiplied in chunks, with the same result."""
    visible = random_mask(2, (3, 3))
    layout = PatchLayout(visible)
    geometry = Geometry((8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    rows = torch.randn(layout.num_visible * 64, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for size in (1, 2**30):
        monkeypatch.setattr("sparkmim.sparse.gather._CHUNK_BYTES", {"cpu": size})
        out = gather_convolution(rows, weight, layout, geometry)
        results.append((out, *torch.autograd.grad(out.square().sum(), (rows, weight))))
    assert layout.num_visible * 64 > 256
    for pieces, whole in zip(*results, strict=True):
        assert_close(pieces, whole, "the result in pieces", 1e-12)


def test_depthwise_convolution_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a depthwise weight is computed in chunks, with the same result."""
    layout = PatchLayout(random_mask(2, (3, 3)))
    geometry = Geometry((4, 4), (5, 5), (2, 2), (2, 2), (1, 1))
    rows = torch.randn(layout.num_visible * 16, 3, dtype=torch.float64)
    weight = torch.randn(3, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for size in (1, 2**30):
        monkeypatch.setattr("sparkmim.sparse.gather._CHUNK_BYTES", {"cpu": size})
        out = image_convolution(rows, weight, layout, geometry, groups=3)
        results.append(*torch.autograd.grad(out.square().sum(), weight))
    assert_close(results[0], results[1], "the gradient in pieces", 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_of_any_strides(dtype: torch.dtype) -> None:
    """Operands may be transposed or slices of larger tensors."""
    a, b, bias = torch.randn(12, 14).to(dtype), torch.randn(14, 10).to(dtype), torch.randn(10).to(dtype)
    for rows in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, ::2].expand(12, 14)):
        for matrix in (b, b.t().contiguous().t(), torch.stack([b, b], 1)[:, 0]):
            expected = rows.double() @ matrix.double()
            tolerance = 1e-6 if dtype == torch.float32 else 1e-14
            assert_close(product(rows, matrix).double(), expected, "the product", tolerance)
            assert_close(product(rows, matrix, bias).double(), expected + bias.double(), "with bias", tolerance)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], list[int], list[int]]:
    visible = draw(masks(max_cells=3))
    rank = visible.ndim - 1
    block = tuple(draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    start = draw(st.lists(st.integers(-4, 2), min_size=rank, max_size=rank))
    length = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    return visible, block, start, length


@given(windows(), st.sampled_from([0.0, -math.inf, 2.5]))
@examples(60)
def test_gather_windows(case: tuple[Tensor, tuple[int, ...], list[int], list[int]], outside: float) -> None:
    visible, block, start, length = case
    layout = PatchLayout(visible)
    images = dense_map(visible, list(block)) * upsample(visible, block).unsqueeze(1)
    found = gather_windows(to_rows(pack(images, layout).values), layout, block, start, length, outside)
    margin = 12
    padded = F.pad(images, [margin] * 2 * len(block), value=outside)
    expected = []
    for sample, *cell in visible.nonzero().tolist():
        first = [at * size + s + margin for at, size, s in zip(cell, block, start, strict=True)]
        expected.append(padded[(sample, ..., *(slice(f, f + n) for f, n in zip(first, length, strict=True)))])
    assert torch.equal(found, torch.stack(expected))


@given(windows())
@examples(40)
def test_gradients_of_gather_windows(case: tuple[Tensor, tuple[int, ...], list[int], list[int]]) -> None:
    visible, block, start, length = case
    layout = PatchLayout(visible)
    rows = torch.randn(layout.num_visible * math.prod(block), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda rows: gather_windows(rows, layout, block, start, length), rows, fast_mode=True)


def test_pack_refuses_what_does_not_divide() -> None:
    layout = PatchLayout(random_mask(2, (2, 3)))
    for shape in ([2, 3, 5, 6], [2, 3, 4, 7], [3, 3, 4, 6], [2, 3, 4], [2, 3, 4, 6, 2], [2]):
        with pytest.raises(ValueError, match=r"does not divide into 2 samples of 2×3 patches"):
            pack(torch.zeros(shape), layout)


def test_unpack_refuses_other_orders() -> None:
    x = pack(torch.randn(2, 3, 4, 4), PatchLayout(random_mask(2, (2, 2))))
    for other in (x.permute(0, 2, 3, 1), x.flatten(2), x.transpose(2, 3), x.unsqueeze(-1)):
        with pytest.raises(ValueError, match=r"unpack needs a map in the order \[B, C, \*S\], not \["):
            unpack(other)


def test_attributes_are_those_of_the_dense_map() -> None:
    visible = random_mask(2, (2, 2), seed=3)
    images = torch.randn(2, 3, 4, 4)
    x = pack(images, PatchLayout(visible))
    assert x.shape == images.shape
    assert x.size(1) == 3
    assert x.size(dim=-1) == 4
    assert x.dim() == x.ndim == 4
    assert x.dtype == torch.float32
    assert x.device == images.device
    assert x.is_floating_point()
    assert not x.requires_grad
    assert x.numel() == 3 * 4 * int(visible.sum())  # visible elements, as normalisation code needs
    assert repr(x) == f"PackedTensor(shape=[2, 3, 4, 4], dtype=torch.float32, {x.patches!r}, block=2×2)"
    assert str(x) == f"{x}" == repr(x)
    assert x.double().dtype == x.to(torch.float64).dtype == x.type(torch.float64).dtype == torch.float64
    assert x.type_as(torch.zeros((), dtype=torch.float64)).dtype == torch.float64
    for same in (
        x.clone(),
        x.detach(),
        x.contiguous(),
        x.data,
        x.to("cpu"),
        x.contiguous(memory_format=torch.channels_last),
    ):
        assert isinstance(same, PackedTensor)
        assert torch.equal(unpack(same), unpack(x))
    assert x.new_zeros(2, 1).shape == (2, 1)
    assert not isinstance(x.new_zeros(2, 1), PackedTensor)
    b, c, h, w = x.shape
    assert (b, c, h, w) == (2, 3, 4, 4)


def test_what_is_pending_cannot_be_unpacked() -> None:
    x = pack(torch.randn(2, 3, 4, 4), PatchLayout(random_mask(2, (2, 2))))
    with pytest.raises(UnsupportedOperation, match="must follow"):
        unpack(F.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_second_derivatives_are_refused(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be wrong, as autograd does not see the kernels."""
    monkeypatch.setattr("sparkmim.sparse.gather._onednn", lambda: True)  # by PyTorch's own product, they are right
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    weight = torch.randn(2, 16, kernel, kernel, requires_grad=True)
    packed = pack(x.repeat(1, 8, 1, 1), PatchLayout(torch.ones(1, 2, 2, dtype=torch.bool)))
    (grad,) = torch.autograd.grad(
        unpack(F.conv2d(packed, weight, padding=kernel // 2)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable|not have been used"):
        torch.autograd.grad(grad.square().sum(), weight)


def test_a_rule_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = random_mask(2, (2, 2))
    x = pack(torch.randn(2, 3, 4, 4), PatchLayout(visible))
    with pytest.raises(UnsupportedOperation, match=r"`(fft_)?fft2` has no rule .*register_rule\('(fft_)?fft2'\)"):
        torch.fft.fft2(x)
    for name in ("fft2", "fft_fft2"):
        monkeypatch.setitem(RULES, name, None)  # removed after the test
        register_rule(name)(lambda func, x: x)
    assert torch.fft.fft2(x) is x


def test_nothing_is_copied() -> None:
    """Wrapping and views share memory; patches of channels-last maps are rows without a copy."""
    visible = random_mask(2, (2, 2))
    x = pack(torch.randn(2, 4, 4, 3).movedim(-1, 1), PatchLayout(visible))
    address = x.data_ptr()
    assert x.values.data_ptr() == address
    assert to_rows(x.values).data_ptr() == address
    assert x.permute(0, 2, 3, 1).data_ptr() == address
    assert x.permute(0, 2, 3, 1).flatten(1, 2).data_ptr() == address


def test_all_deltas_of_a_volume() -> None:
    """Every one of the 27 neighbours of a 3-D window's patch contributes to its gradient."""
    visible = torch.ones(1, 3, 3, 3, dtype=torch.bool)
    layout = PatchLayout(visible)
    rows = torch.zeros(27, 1, dtype=torch.float64, requires_grad=True)
    found = gather_windows(rows, layout, (1, 1, 1), (-1,) * 3, (3,) * 3)
    (grad,) = torch.autograd.grad(found.sum(), rows)
    counts = [math.prod(3 - (at != 1) for at in cell) for cell in itertools.product(range(3), repeat=3)]
    assert grad.flatten().tolist() == counts
