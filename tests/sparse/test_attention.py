"""Attention and matrix products over the visible positions of each sample."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from agreement import agree, random_mask, randomised
from torch import Tensor, nn

from sparkmim.sparse import PatchLayout, pack

BOTH = pytest.mark.parametrize(
    "visible", [random_mask(2, (2, 3), seed=5), random_mask(3, (2, 2), ragged=True, seed=6)], ids=["uniform", "ragged"]
)


NORMS = ["EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dS0", "EvoNorm2dS1", "FilterResponseNormTlu2d"]


def heads(x: Tensor) -> Tensor:
    """Splits a map into heads: `[B, 6, H, W]` to `[B, 2, H · W, 3]`."""
    return x.reshape(x.shape[0], 2, 3, -1).transpose(2, 3)


@BOTH
def test_attention(visible: Tensor) -> None:
    def attention(x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(heads(x), heads(x.sin()), heads(x.cos()))
        return x.transpose(2, 3).reshape(x.shape[0], 6, -1)

    agree(attention, visible, (2, 2), 6)


@BOTH
def test_attention_to_a_coarser_map(visible: Tensor) -> None:
    agree(lambda x: F.scaled_dot_product_attention(heads(x), *(heads(F.avg_pool2d(x, 2)),) * 2), visible, (2, 2), 6)


@BOTH
def test_softmax_and_normalisation_over_positions(visible: Tensor) -> None:
    agree(lambda x: x.flatten(2).softmax(-1), visible, (2, 2))
    agree(lambda x: x.flatten(2).transpose(1, 2).softmax(1), visible, (2, 2))
    agree(lambda x: F.softmax(x.flatten(2), dim=2).sum(2), visible, (2, 2))
    agree(lambda x: F.normalize(x.flatten(2), dim=-1), visible, (2, 2))


@BOTH
def test_sums_over_positions(visible: Tensor) -> None:
    """Linear attention multiplies channels by channels, then the result by every position."""

    def covariance(x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return tokens @ tokens.sin().transpose(1, 2)

    def linear_attention(x: Tensor) -> Tensor:
        query, key = heads(x).sin(), heads(x).cos()
        return query @ (key.transpose(2, 3) @ heads(x))

    agree(covariance, visible, (2, 2))
    agree(linear_attention, visible, (2, 2), 6)
    agree(lambda x: covariance(x) @ x.flatten(2), visible, (2, 2))
    agree(lambda x: torch.ones(1, 2, 3, dtype=x.dtype) @ x.flatten(2), visible, (2, 2))


@BOTH
@pytest.mark.parametrize("use_attn", [True, False])
def test_global_context(visible: Tensor, use_attn: bool) -> None:
    agree(randomised(timm.layers.GlobalContext(8, use_attn=use_attn, fuse_add=True)), visible, (2, 2), 8)


@BOTH
def test_statistics_of_the_batch(visible: Tensor) -> None:
    agree(lambda x: x.var((0, 2, 3)), visible, (2, 2))
    agree(lambda x: x - x.mean((0, 2, 3), keepdim=True), visible, (2, 2))


@BOTH
@pytest.mark.parametrize("norm", NORMS)
def test_evonorm_and_relatives(visible: Tensor, norm: str) -> None:
    settings = {"groups": 4} if "S" in norm[-2:] else {}
    module = getattr(timm.layers, norm)(8, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # They compute their variances in float32.
    agree(module.double().train(), visible, (2, 2), 8, tolerance=1e-5)


def test_dropout_in_attention_draws() -> None:
    x = pack(torch.randn(2, 4, 4, 4), PatchLayout(random_mask(2, (2, 2)))).flatten(2).transpose(1, 2)
    one, other = (F.scaled_dot_product_attention(x, x, x, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(one.values, other.values)


@BOTH
def test_tokens_through_a_layer(visible: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm = nn.Linear(6, 18), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = (part.unflatten(2, (2, 3)).transpose(1, 2) for part in self.qkv(self.norm(tokens)).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return (tokens + out).transpose(1, 2).reshape(b, c, h, w)

    agree(randomised(Block()), visible, (2, 2), 6)
