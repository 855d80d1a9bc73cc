"""The decoder, the step to dense maps, and how both begin."""

import math

import pytest
import torch
from torch import nn

from sparkmim.models.decoder import ChannelLayerNorm, Decoder, DecoderBlock, Densify, NormKind, initialise
from sparkmim.sparse import PatchLayout, pack


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes(rank: int) -> None:
    decoder = Decoder(32, (2, 4, 8), channels=5, rank=rank).eval()
    assert [block.conv1.in_channels for block in decoder.blocks] == [32, 16, 8]
    maps = [torch.randn(2, 4 * stride, *(16 // stride,) * rank) for stride in (2, 4, 8)]
    assert decoder(maps).shape == (2, 5, *(16,) * rank)


def test_every_map_counts() -> None:
    decoder = Decoder(32, (2, 4, 8)).eval()
    maps = [torch.randn(1, 4 * stride, *(16 // stride,) * 2, requires_grad=True) for stride in (2, 4, 8)]
    grads = torch.autograd.grad(decoder(maps).square().sum(), maps)
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_one_map_is_enough() -> None:
    assert Decoder(32, (8,)).eval()([torch.randn(1, 32, 2, 2)]).shape == (1, 3, 16, 16)


def test_a_block() -> None:
    block = DecoderBlock(16)
    assert block(torch.randn(2, 16, 3, 5)).shape == (2, 8, 6, 10)
    assert block.upsample.bias is not None
    assert block.conv1.bias is None
    assert block.conv2.bias is None
    assert isinstance(block.act, nn.ReLU6)


def test_widths_that_do_not_halve() -> None:
    with pytest.raises(ValueError, match=r"decoder_width 100 must be a multiple of 32 \(halved 5 times\); use 96"):
        Decoder(100, (4, 8, 16, 32))
    with pytest.raises(ValueError, match="decoder_width 0 must be a multiple of 32"):
        Decoder(0, (32,))
    with pytest.raises(ValueError, match=r"strides \[3, 6\] are no powers of 2"):
        Decoder(32, (3, 6))


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize(("deepest", "width"), [(True, 6), (True, 8), (False, 6), (False, 8)])
def test_densify(norm: NormKind, deepest: bool, width: int) -> None:
    densify = Densify(6, width, norm, deepest).eval()
    nn.init.normal_(densify.mask_token)
    visible = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    images = torch.randn(2, 6, 4, 4)
    out = densify(pack(images, PatchLayout(visible)))
    assert out.shape == (2, width, 4, 4)
    normed = {"batch": nn.BatchNorm2d(6).eval(), "layer": ChannelLayerNorm(6, eps=1e-6), "none": nn.Identity()}[norm]
    mask = visible.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)
    expected = densify.project(torch.where(mask, normed(images), densify.mask_token))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if deepest and width == 6:
        assert isinstance(densify.project, nn.Identity)
    else:
        assert densify.project.kernel_size == ((1, 1) if deepest else (3, 3))
        assert densify.project.bias is not None


def test_channel_layer_norm() -> None:
    norm = ChannelLayerNorm(6, eps=1e-6)
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(norm(x), (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt())


def test_initialisation() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([Decoder(64, (4, 8)), Densify(64, 64, "batch", deepest=False)])
    initialise(parts)
    block = parts[0].blocks[0]
    for weight in (block.conv1.weight, block.conv2.weight, parts[1].project.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    # transposed convolution: Kaiming, fan-out, which PyTorch counts along the second axis's inputs
    fan_out = block.upsample.weight.shape[0] * 16
    assert block.upsample.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    token = parts[1].mask_token
    assert 0 < token.abs().max() <= 0.02
    assert token.std().item() == pytest.approx(0.0108, rel=0.3)  # a normal cut at one deviation
    for name, parameter in parts.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".norm" in name:
            assert (parameter == 1).all(), name
