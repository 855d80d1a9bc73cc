"""Weights of ConvNeXt V2's release: names and shapes of its encoder, and of its masked autoencoder, FCMAE.

A published `convnextv2_*_1k_224_fcmae.pt` holds the encoder alone. A checkpoint of the release's own pretraining holds
the decoder too, and the encoder's layers as MinkowskiEngine stores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

GRN = {"mlp.grn.weight": "grn.gamma", "mlp.grn.bias": "grn.beta"}
"""The release's names of response normalisation, by timm's; its shape is `[1, 1, 1, C]`, or `[1, C]`."""

_DECODER = {
    "proj": "project", "mask_token": "mask_token", "decoder.0.dwconv": "block.depthwise",
    "decoder.0.norm": "block.norm", "decoder.0.pwconv1": "block.expand", "decoder.0.grn.gamma": "block.response.weight",
    "decoder.0.grn.beta": "block.response.bias", "decoder.0.pwconv2": "block.reduce", "pred": "head",
}  # fmt: skip
"""Our names of the decoder's parts, by the release's."""


def is_autoencoder(tensors: Mapping[str, Tensor]) -> bool:
    """Tells whether tensors are those of FCMAE, encoder and decoder."""
    return {"mask_token", "pred.weight", "pred.bias", "encoder.downsample_layers.0.0.weight"} <= tensors.keys()


def parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits an autoencoder: the encoder under the names of the release's dense network, the decoder under ours.

    What has no place in our decoder keeps its name.
    """
    decoder = dict(tensors)
    encoder = {name: decoder.pop(name) for name in tensors if name.startswith("encoder.")}
    dense = (_dense(name.removeprefix("encoder."), tensor) for name, tensor in encoder.items())
    renamed = {_decoder_name(name): flat_grn(name, tensor) for name, tensor in decoder.items()}
    channels = pixels(tensors)[0]
    for name in ("head.weight", "head.bias"):  # in a patch, channels come last there, and first here
        renamed[name] = renamed[name].view(-1, channels, *renamed[name].shape[1:]).transpose(0, 1).flatten(0, 1)
    return dict(dense), renamed


def flat_grn(name: str, tensor: Tensor) -> Tensor:
    """Returns a parameter of response normalisation as timm has it, `[C]`; others as they are."""
    return tensor.flatten() if ".grn." in name else tensor


def _dense(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = re.sub(r"\.(ln|linear)(?=\.\w+$)", "", name)
    if name.endswith(".kernel"):  # [k², in, out], or [k², C] of a depthwise layer; counted column by column
        side = math.isqrt(tensor.shape[0])
        kernel = tensor[:, None] if tensor.ndim == 2 else tensor
        weight = kernel.view(side, side, *kernel.shape[1:]).permute(3, 2, 1, 0)  # [out, in, k, k]
        return name.removesuffix("kernel") + "weight", weight
    return name, tensor.flatten() if name.endswith(".bias") else tensor


def _decoder_name(name: str) -> str:
    for theirs, ours in _DECODER.items():
        if re.fullmatch(rf"{re.escape(theirs)}(\.weight|\.bias)?", name):
            return ours + name.removeprefix(theirs)
    return name


def pixels(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Returns the number of channels of an autoencoder's images, and the side of its patches in pixels."""
    channels = tensors["encoder.downsample_layers.0.0.weight"].shape[1]
    return channels, math.isqrt(tensors["pred.weight"].shape[0] // channels)
