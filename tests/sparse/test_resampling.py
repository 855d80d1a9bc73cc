"""Padding, interpolation and pixel shuffling."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from agreement import agree, examples, masks, random_mask, randomised
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

RAGGED = random_mask(3, (2, 3), ragged=True, seed=1)


class Padded(nn.Module):
    """Pads, then runs a module."""

    def __init__(self, pad: tuple[int, ...], then: nn.Module, mode: str = "constant", value: float | None = None):
        super().__init__()
        self.pad, self.then, self.mode, self.value = pad, then, mode, value

    def forward(self, x: Tensor) -> Any:
        x = F.pad(x, self.pad, self.mode, self.value)
        assert x.ndim == 4
        return self.then(x)


@given(masks(2), st.integers(1, 5), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.data())
@examples(40)
def test_zeros_before_a_convolution(
    visible: Tensor, kernel: int, stride: int, groups: int, data: st.DataObject
) -> None:
    """Padding may be split in any way before and after the map; dense and depthwise convolution."""
    total = max(kernel - stride, 0)
    first = [data.draw(st.integers(0, total)) for _ in range(2)]
    pad = (first[1], total - first[1], first[0], total - first[0])
    conv = nn.Conv2d(3, 3, kernel, stride, groups=groups)
    agree(randomised(Padded(pad, conv)), visible, (2, 4))


def test_shape_tells_of_the_border() -> None:
    def function(x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 2, 3, 4))
        assert padded.shape == (x.shape[0], 3, x.shape[2] + 7, x.shape[3] + 3)
        return F.conv2d(padded, torch.ones(2, 3, 8, 4, dtype=x.dtype))

    agree(function, RAGGED, (4, 4))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_borders(mode: str) -> None:
    """They repeat visible values near the border, and zeros where it is masked."""
    for kernel, block in ((3, (4, 4)), (3, (1, 1)), (5, (2, 1))):
        conv = nn.Conv2d(3, 4, kernel, padding=kernel // 2, padding_mode=mode)
        agree(randomised(conv), random_mask(2, (3, 3), ragged=True, seed=2), block)


def test_a_constant_border() -> None:
    agree(randomised(Padded((1, 1, 1, 1), nn.Conv2d(3, 4, 3), value=2.5)), RAGGED, (2, 2))
    agree(randomised(Padded((1, 1, 1, 1), nn.Conv2d(3, 4, 5, padding=1))), RAGGED, (2, 2))
    agree(lambda x: F.conv2d(F.pad(F.pad(x, (1, 0)), (0, 1, 1, 1)), torch.ones(2, 3, 3, 3).double()), RAGGED, (2, 2))


def test_a_cropped_border() -> None:
    """A shift of one position, as in the second path of a factorised reduction."""
    agree(randomised(Padded((-1, 1, -1, 1), nn.Conv2d(3, 4, 1, 2))), RAGGED, (4, 4))
    agree(Padded((-1, 1, -1, 1), nn.AvgPool2d(1, 2)), RAGGED, (4, 4))


def test_padded_pooling() -> None:
    for value in (0.0, float("-inf")):
        agree(Padded((0, 1, 0, 1), nn.MaxPool2d(3, 2), value=value), RAGGED, (4, 4))
    agree(Padded((0, 1, 0, 1), nn.MaxPool2d(2, 1, ceil_mode=True)), RAGGED, (4, 4))
    agree(Padded((1, 0, 1, 0), nn.MaxPool2d(2, 1)), RAGGED, (4, 4))
    agree(Padded((1, 1, 1, 1), nn.MaxPool2d(3, 1), "replicate"), RAGGED, (4, 4))
    agree(Padded((0, 1, 0, 1), nn.AvgPool2d(3, 2)), RAGGED, (4, 4))
    agree(Padded((0, 1, 1, 0), nn.AvgPool2d(2, 1, divisor_override=3)), RAGGED, (4, 4))


def test_padded_pooling_rounded_up() -> None:
    """Positions beyond the padded map are ignored, unlike the border."""
    agree(lambda x: F.max_pool2d(F.pad(x - 9, (1, 0, 0, 0)), 3, 2, ceil_mode=True), RAGGED, (4, 4))
    agree(lambda x: F.max_pool2d(F.pad(x - 9, (1, 0, 1, 0)), 4, 2, ceil_mode=True), RAGGED, (4, 4))


@pytest.mark.parametrize(("factor", "size"), [(0.6, 5), (3.2, 5), (4.1, 10)])
def test_nearest_neighbours_by_uneven_factors(factor: float, size: int) -> None:
    """PyTorch computes positions from the given factor, even where the sizes imply another."""
    visible = random_mask(2, (1, 2), seed=1)
    agree(lambda x: F.interpolate(x, scale_factor=factor), visible, (size, size))


def test_padded_channels_and_no_padding() -> None:
    agree(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), RAGGED, (2, 2))
    agree(lambda x: F.pad(x, (0, 0, 0, 0)).relu_() + x, RAGGED, (2, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_timm_same_layers(kernel: int, stride: int) -> None:
    agree(randomised(timm.layers.Conv2dSame(3, 4, kernel, stride)), RAGGED, (4, 4))
    agree(randomised(timm.layers.Conv2dSame(3, 3, kernel, stride, groups=3)), RAGGED, (4, 4))
    agree(timm.layers.AvgPool2dSame(kernel, stride), RAGGED, (4, 4))
    agree(timm.layers.create_pool2d("max", kernel, stride, padding="same"), RAGGED, (4, 4))


@pytest.mark.parametrize("filter_size", [3, 5])
def test_blur_pool(filter_size: int) -> None:
    agree(timm.layers.BlurPool2d(3, filter_size).double(), RAGGED, (4, 4))
    agree(timm.layers.BlurPool2d(3, filter_size, pad_mode="constant").double(), RAGGED, (4, 4))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("factor", [2, 3, 0.5])
def test_interpolation(mode: str, factor: float) -> None:
    agree(lambda x: F.interpolate(x, scale_factor=factor, mode=mode), RAGGED, (4, 2))
    agree(lambda x: F.interpolate(x, size=(int(8 * factor), int(6 * factor)), mode=mode), RAGGED, (4, 2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_nearest_neighbours_stay_in_their_patch(rank: int) -> None:
    visible = random_mask(2, (2,) * rank, ragged=True, seed=3)
    agree(nn.Upsample(scale_factor=2), visible, (2,) * rank)
    agree(lambda x: F.interpolate(F.max_pool1d(x, 2) if rank == 1 else x, scale_factor=4), visible, (2,) * rank)
    agree(lambda x: F.interpolate(x, scale_factor=0.5), visible, (4,) * rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolution(rank: int) -> None:
    layer = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    visible = random_mask(2, (2,) * rank, ragged=True, seed=3)
    agree(randomised(layer(3, 2, 2, stride=2)), visible, (2,) * rank)
    agree(randomised(layer(3, 2, 4, stride=2, padding=1)), visible, (2,) * rank)
    agree(randomised(layer(3, 3, 3, padding=1, groups=3)), visible, (2,) * rank)


def space_to_depth(x: Tensor, size: int) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4).contiguous()
    return x.view(b, c * size * size, h // size, w // size)


def test_space_to_depth_and_back() -> None:
    agree(lambda x: space_to_depth(x, 2), RAGGED, (4, 2))
    agree(lambda x: space_to_depth(x, 4), RAGGED, (4, 4))
    agree(lambda x: F.conv2d(space_to_depth(x, 2), torch.ones(3, 12, 3, 3).double(), padding=1), RAGGED, (4, 4))
    agree(lambda x: timm.layers.space_to_depth.DepthToSpace(2)(space_to_depth(x, 2)), RAGGED, (4, 4))
    agree(nn.Sequential(nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2)), RAGGED, (4, 4))
    agree(nn.ChannelShuffle(2), RAGGED, (2, 2), 6)
    agree(lambda x: x.view(x.shape[0], 3, x.shape[2] // 2, 2, x.shape[3]).mean(3), RAGGED, (4, 2))
