"""SparK as other implementations run it: on whole maps, with every layer of the encoder masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparkmim import SparK
from sparkmim.models.decoder import DecoderBlock, Densify
from sparkmim.models.spark import SparKOutput, reconstruction_loss
from sparkmim.sparse import PatchLayout


class MaskedLayers(TorchFunctionMode):
    """Masks what convolutions and pooling give, and normalises visible positions alone, as the original does.

    For networks of convolutions, BatchNorm and ReLU.
    """

    def __init__(self, layout: PatchLayout) -> None:
        super().__init__()
        self.layout = layout

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            x, *others = args
            visible = _at(x, self.layout)[:, 0]  # [B, H, W]
            normed = func(x.movedim(1, -1)[visible], *others, **kwargs)  # [positions, C]
            out = normed.new_zeros(*visible.shape, x.shape[1])
            out[visible] = normed
            return out.movedim(-1, 1)
        out = func(*args, **kwargs)
        windows = getattr(func, "__name__", "") in ("conv2d", "max_pool2d", "avg_pool2d")
        return out * _at(out, self.layout) if windows else out


def encode_dense(model: SparK, images: Tensor, layout: PatchLayout) -> list[Tensor]:
    """Returns dense maps `[B, C_i, H_i, W_i]`, zero where masked."""
    with MaskedLayers(layout):
        maps: list[Tensor] = model.hierarchy(images * _at(images, layout))
        return maps


def densify_dense(model: SparK, maps: Iterable[Tensor], layout: PatchLayout) -> list[Tensor]:
    """Returns dense maps `[B, D_i, H_i, W_i]` of the decoder's width."""
    return [_densify(part, map_, layout) for part, map_ in zip(model.densify, maps, strict=True)]


def _densify(part: Densify, x: Tensor, layout: PatchLayout) -> Tensor:
    with MaskedLayers(layout):
        normed = part.norm(x)
    return part.project(torch.where(_at(x, layout), normed, part.mask_token.to(normed.dtype)))


def decode_dense(model: SparK, maps: list[Tensor]) -> Tensor:
    """Returns the prediction `[B, 3, H, W]`, by PyTorch's modules alone."""
    decoder = model.decoder
    at_stride = dict(zip(decoder.strides, maps, strict=True))
    x = at_stride.pop(decoder.strides[-1])
    for stride, block in zip(decoder.block_strides, decoder.blocks, strict=True):
        assert isinstance(block, DecoderBlock)
        x = block.upsample(x + at_stride[stride] if stride in at_stride else x)
        x = block.norm2(block.conv2(block.act(block.norm1(block.conv1(x)))))
    return decoder.head(x)


def _at(x: Tensor, layout: PatchLayout) -> Tensor:
    """Returns the mask `[B, 1, H, W]` at the resolution of a map."""
    block = [side // cells for side, cells in zip(x.shape[2:], layout.visible.shape[1:], strict=True)]
    return layout.upsampled(tuple(block)).unsqueeze(1)


def masked_dense() -> AbstractContextManager[object]:
    """Within the context, SparK computes hidden patches too, and masks every layer."""

    def forward(
        self: SparK,
        images: Tensor,
        visible: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_features: bool = False,
    ) -> SparKOutput:
        if visible is None:
            visible = self.draw_visible(len(images), generator)
        layout = PatchLayout(visible, images.device)
        maps = encode_dense(self, images, layout)
        features = maps[-1].sum((2, 3)) / _at(maps[-1], layout).sum((2, 3)) if with_features else None
        prediction = decode_dense(self, densify_dense(self, maps, layout))
        loss = reconstruction_loss(prediction, images, layout)
        return SparKOutput(loss, layout.visible, prediction, images, features)

    return patch.object(SparK, "forward", forward)
