"""A network with an operation that has no rule, and the rule for it, as an example to write your own by.

    sparkmim verify --model examples/own_rule.py:quantised_cnn --image-size 32

Fake quantisation is elementwise, so the rule applies it to the stored visible patches. An operation that looks at
neighbours and is local can run on the whole map by `sparkmim.sparse.on_dense_map`, which is exact too, but as slow as
without a mask. A rule written by `like` or `on_dense_map` also serves as the definition, on a dense tensor with a mask,
that `verify` compares it with. Both must be registered before the network runs, as in the file that `--model` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.sparse import PackedTensor, define, like, on_dense_map, register_rule


@define("fake_quantize_per_tensor_affine")
@register_rule("fake_quantize_per_tensor_affine")
def _fake_quantise(func: Callable[..., Any], x: PackedTensor, *settings: Any) -> PackedTensor:
    """Inside a rule, `x` is the plain tensor `[n, C, *block]` of all visible patches; `like` wraps the result."""
    return like(x, func(x, *settings))


@define("lp_pool2d")
@register_rule("lp_pool2d")
def _lp_pool(func: Callable[..., Any], x: PackedTensor, *settings: Any, **options: Any) -> PackedTensor:
    """Looks at neighbours: runs on the dense map, zero where masked, and keeps the visible patches."""
    return on_dense_map(x, "lp_pool2d", lambda dense: func(dense, *settings, **options))


class Quantised(nn.Module):
    """A convolution whose outputs are rounded to eighths."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels_in, H, W]` to `[B, channels, H, W]`."""
        return torch.fake_quantize_per_tensor_affine(self.conv(x).relu(), 0.125, 0, 0, 255)


def quantised_cnn(in_chans: int = 3) -> nn.Module:
    """Three levels, at strides 1, 2 and 4."""
    return nn.Sequential(
        Quantised(in_chans, 16), nn.LPPool2d(2, 2), Quantised(16, 32), nn.LPPool2d(2, 2), Quantised(32, 64)
    )
