"""The decoder's fused operations against PyTorch's modules: values, gradients, running statistics, memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from agreement import TOLERANCE, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparkmim.models import decoder as decoder_module
from sparkmim.models.decoder import Decoder, DecoderBlock, folded_upsampling, normalised_convolution

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def assert_same(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor, modules: tuple[nn.Module, nn.Module]
) -> None:
    """Compares values, gradients to the input and the parameters, and buffers after both calls."""
    found, expected = one(x), other(x)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    grad = torch.randn_like(expected)
    grads = [
        torch.autograd.grad(out, [x, *module.parameters()], grad)
        for out, module in zip((found, expected), modules, strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    for a, b in zip(*(module.buffers() for module in modules), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@given(st.data())
@examples(40)
def test_normalised_convolution(data: st.DataObject) -> None:
    rank, relu6 = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=rank, max_size=rank))
    channels, out = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    momentum, kernel = data.draw(st.sampled_from([0.1, 0.5, None])), data.draw(st.sampled_from([1, 3]))
    torch.manual_seed(0)
    norm = NORMS[rank](channels, momentum=momentum, track_running_stats=data.draw(st.booleans()))
    nn.init.uniform_(norm.weight, 1, 8)
    conv = CONVOLUTIONS[rank](channels, out, kernel, padding=kernel // 2, bias=data.draw(st.booleans()))
    mine = nn.ModuleList([norm, conv]).double().train(data.draw(st.booleans()))
    plain = copy.deepcopy(mine)
    x = (3 * torch.randn(3, channels, *sizes, dtype=torch.float64)).requires_grad_()

    def modules(x: Tensor) -> Tensor:
        normed = plain[0](x)
        return plain[1](nn.functional.relu6(normed) if relu6 else normed)  # type: ignore[no-any-return]

    assert_same(
        lambda x: normalised_convolution(x, norm, nn.ReLU6() if relu6 else None, conv), modules, x, (mine, plain)
    )


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkmim.models.decoder._CHUNK_BYTES", 2 * 4 * 36 * 8)
    torch.manual_seed(0)
    mine = nn.ModuleList([nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)]).double()
    plain = copy.deepcopy(mine)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda x: normalised_convolution(x, mine[0], nn.ReLU6(), mine[1]),  # type: ignore[arg-type]
        lambda x: plain[1](nn.functional.relu6(plain[0](x))), x, (mine, plain),
    )  # fmt: skip


def test_one_value_per_channel_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"needs more than one value per channel, not a map \[1, 4, 1, 1\]"):
        normalised_convolution(torch.randn(1, 4, 1, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 3, padding=1))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.booleans())
@examples(40)
def test_folded_upsampling(height: int, width: int, channels: int, batch: int, biased: bool) -> None:
    torch.manual_seed(0)
    mine = DecoderBlock(channels + 1).double().to(memory_format=torch.channels_last)
    if not biased:
        mine.upsample.bias = None
    pair = nn.ModuleList([mine.upsample, mine.conv1])
    plain = copy.deepcopy(pair)
    x = torch.randn(batch, channels + 1, height, width, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda x: folded_upsampling(x, mine.upsample, mine.conv1),  # type: ignore[arg-type]
        lambda x: plain[1](plain[0](x)), x, (pair, plain),
    )  # fmt: skip


@pytest.mark.parametrize("folds", [True, False])
def test_a_decoder(folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module.DecoderBlock, "folds", lambda *_: folds)
    torch.manual_seed(0)
    mine = Decoder(16, (2, 4)).double()
    plain = copy.deepcopy(mine)
    shallow = torch.randn(2, 8, 6, 4, dtype=torch.float64)

    def modules(x: Tensor) -> Tensor:
        for number, block in enumerate(plain.blocks):
            assert isinstance(block, DecoderBlock)
            x = block.act(block.norm1(block.conv1(block.upsample(x))))
            x = block.norm2(block.conv2(x))
            x = x + shallow if number == 0 else x
        return plain.head(x)  # type: ignore[no-any-return]

    deep = torch.randn(2, 16, 3, 2, dtype=torch.float64, requires_grad=True)
    assert_same(lambda x: mine([shallow, x]), modules, deep, (mine, plain))


def test_folds_where_it_pays() -> None:
    assert DecoderBlock(48).folds(torch.zeros(8, 48, 112, 112))
    assert not DecoderBlock(768).folds(torch.zeros(8, 768, 7, 7))
    assert not DecoderBlock(4, rank=3).folds(torch.zeros(2, 4, 64, 64, 64))
    assert not DecoderBlock(4, factor=3).folds(torch.zeros(2, 4, 256, 256))


@pytest.mark.parametrize("folds", [True, False])
def test_autocast(folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module.DecoderBlock, "folds", lambda *_: folds)
    torch.manual_seed(0)
    model = Decoder(32, (4,))
    x = torch.randn(2, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = model([x])
    assert found.dtype == torch.bfloat16
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    expected = model([x])
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_activations_are_not_kept() -> None:
    """Of the block, the backward pass keeps two maps of the high resolution with `c` channels, of three in all."""
    block = DecoderBlock(8).to(memory_format=torch.channels_last)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(x, nn.Identity())
    map_bytes = 2 * 8 * 16 * 16 * 4
    assert sum(size == map_bytes for size in kept.values()) == 2
