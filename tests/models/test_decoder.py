"""The decoder, the step to dense maps, and how both begin."""

import math

import pytest
import timm
import torch
from torch import nn

from sparkmim.models.decoder import (
    ChannelLayerNorm,
    Decoder,
    DecoderBlock,
    Densify,
    NormKind,
    initialise,
    upsampling_factors,
)
from sparkmim.models.fcmae import ConvNeXtBlock, FCMAEDecoder
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
    assert block(torch.randn(2, 16, 3, 5), nn.Identity()).shape == (2, 8, 6, 10)
    assert block.upsample.bias is not None
    assert block.conv1.bias is None
    assert block.conv2.bias is None
    assert isinstance(block.act, nn.ReLU6)


def test_widths_are_halved_rounding_down() -> None:
    decoder = Decoder(48, (4, 8, 16, 32)).eval()
    assert [block.conv1.in_channels for block in decoder.blocks] == [48, 24, 12, 6, 3]  # type: ignore[union-attr]
    assert [decoder.width_at(stride) for stride in (4, 8, 16, 32)] == [6, 12, 24, 48]
    assert decoder.head.in_channels == 1
    maps = [torch.randn(2, decoder.width_at(stride), 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    assert decoder(maps).shape == (2, 3, 64, 64)


def test_widths_without_a_channel_left() -> None:
    with pytest.raises(ValueError, match="decoder_width 31, halved 5 times, leaves no channel; use 32 or more"):
        Decoder(31, (4, 8, 16, 32))


def test_strides_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"from stride 6 to stride 4, which does not divide it"):
        Decoder(32, (4, 6))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("strides", [(7,), (7, 14), (2, 12), (3, 6)])
def test_strides_that_are_no_powers_of_two(strides: tuple[int, ...], rank: int) -> None:
    """One block per prime factor; strides that the decoder passes get their map."""
    decoder = Decoder(32, strides, channels=2, rank=rank).eval()
    size = strides[-1]
    maps = [
        torch.randn(1, decoder.width_at(stride), *(2 * size // stride,) * rank, requires_grad=True)
        for stride in strides
    ]
    out = decoder(maps)
    assert out.shape == (1, 2, *(2 * size,) * rank)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.square().sum(), maps))


def test_factors() -> None:
    assert upsampling_factors([4, 8, 16, 32]) == [2] * 5
    assert upsampling_factors([3, 12]) == [2, 2, 3]
    assert upsampling_factors([7]) == [7]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fcmae(rank: int) -> None:
    """Every position of the deepest map predicts the pixels beneath it, in their places."""
    visible = torch.zeros(2, *(2,) * rank, dtype=torch.bool)
    visible.view(2, -1)[:, 0] = True
    decoder = FCMAEDecoder(16, 6, stride=4, channels=3, rank=rank)
    initialise(decoder)
    assert 0 < decoder.mask_token.abs().max() <= 0.02
    map_ = torch.randn(2, 6, *(4,) * rank)
    packed = pack(map_, PatchLayout(visible))
    out = decoder([decoder.fill(packed)])
    assert out.shape == (2, 3, *(16,) * rank)
    mask = visible
    for axis in range(1, 1 + rank):
        mask = mask.repeat_interleave(2, axis)
    filled = torch.where(mask.unsqueeze(1), decoder.project(map_), decoder.mask_token)
    prediction = decoder.head(decoder.block(filled))
    at = (1, slice(None), *(3,) * rank)  # the last position of the second sample
    corner = (1, slice(None), *(slice(12, 16),) * rank)
    torch.testing.assert_close(out[corner].flatten(), prediction[at], rtol=1e-5, atol=1e-6)


def test_the_block_is_that_of_convnext_v2() -> None:
    """timm's, weight by weight."""
    ours = ConvNeXtBlock(8)
    theirs = timm.models.convnext.ConvNeXtBlock(8, use_grn=True, ls_init_value=None, norm_layer=nn.LayerNorm)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    names = {"depthwise": "conv_dw", "norm": "norm", "expand": "mlp.fc1", "response": "mlp.grn", "reduce": "mlp.fc2"}
    state = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": t for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    theirs.norm.eps = 1e-6
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


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
