"""Files in the form of the original SparK release, the reverse of `official`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparkmim.data import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.interop.network import Network, convnext_name, linear_weights, without_head

_CONVNEXT = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
_DENSIFY = {"norm": "densify_norms", "project": "densify_projs", "mask_token": "mask_tokens"}
_DECODER = {"upsample": "up_sample", "conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}


def original_name(name: str, maps: int = 4) -> str:
    """The original's name of a tensor of `SparK`.

    Args:
        name: ours; of the encoder, timm's behind `encoder.`.
        maps: how many feature maps the model decodes from; the original numbers them from the deepest.

    >>> original_name("densify.3.project.bias"), original_name("decoder.blocks.1.norm2.bias")
    ('densify_projs.0.bias', 'dense_decoder.dec.1.conv.4.bias')
    >>> original_name("encoder.stages.1.blocks.0.mlp.fc1.bias")
    'sparse_encoder.sp_cnn.stages.1.0.pwconv1.bias'
    """
    if name.startswith("encoder."):
        return "sparse_encoder.sp_cnn." + convnext_name(name.removeprefix("encoder."), _CONVNEXT)
    if match := re.fullmatch(r"densify\.(\d+)\.(norm|project|mask_token)(.*)", name):
        return f"{_DENSIFY[match[2]]}.{maps - 1 - int(match[1])}{match[3]}"
    if match := re.fullmatch(r"decoder\.blocks\.(\d+)\.(\w+)\.(.+)", name):
        return f"dense_decoder.dec.{match[1]}.{_DECODER[match[2]]}.{match[3]}"
    return name.replace("decoder.head.", "dense_decoder.proj.")


def original_file(network: Network) -> dict[str, Any]:
    """The content of a `.pth` file.

    Of pretrained weights, encoder and decoder under `module`, with the keys beside it that the release has
    (`*_withdecoder_1kpretrained_spark_style.pth`); of an encoder or classifier, the encoder alone at the top level, a
    ResNet under timm's names (`*_timm_style.pth`), a ConvNeXt under its release's (`*_official_style.pth`).

    Raises:
        ValueError: if the original has no such network or decoder, or other images than of three channels.
    """
    family, known = network.family(), network.weights.metadata
    if family is None or network.name.startswith("convnextv2"):
        raise ValueError(
            f"the original SparK takes ordinary ResNets and ConvNeXts (V1), and {network.called()} is neither; use "
            "timm, onnx or torch-export"
        )
    name, encoder = network.in_timm()
    encoder = linear_weights(without_head(encoder))
    if network.weights.kind != "pretrained":
        return {convnext_name(key, _CONVNEXT): tensor for key, tensor in encoder.items()}

    size = known["image_size"]
    if known.get("decoder", "spark") != "spark" or network.weights.channels != 3 or len(set(size)) != 1:
        raise ValueError(
            "the original SparK has one decoder, spark, and square images of 3 channels; export the encoder alone "
            "(its file encoder.safetensors)"
        )
    tensors = network.weights.tensors
    maps = sum(key.endswith(".mask_token") for key in tensors)
    blocks = len({key.split(".")[2] for key in tensors if key.startswith("decoder.blocks.")})
    if known.get("patch_size") not in (None, 2**blocks):
        raise ValueError(
            f"the original SparK hides patches of the network's stride, {2**blocks}, not of {known['patch_size']}; "
            "export the encoder alone (its file encoder.safetensors)"
        )
    ours = {f"encoder.{key}": tensor for key, tensor in encoder.items()}
    ours |= {key: tensor.contiguous() for key, tensor in tensors.items() if not key.startswith("encoder.")}
    config = {
        "mask_ratio": known.get("mask_ratio", 0.6),
        "densify_norm_str": "bn" if family == "resnet" else "ln",
        "sbn": False,
        "hierarchy": maps,
        "sparse_encoder.input_size": size[0],
        "dense_decoder.width": tensors["decoder.blocks.0.upsample.weight"].shape[0],
    }
    module = {**_unused(size[0]), **_in_order({original_name(key, maps): tensor for key, tensor in ours.items()})}
    return {
        "args": "",
        "input_size": size[0],
        "arch": name,
        "epoch": int(known.get("epoch", 0)),
        "performance_desc": "",
        "module": {**module, "config": config},
        "optimizer": {},
        "is_pretrain": True,
    }


def _unused(size: int) -> dict[str, Tensor]:
    """Buffers that the original registers, and does not use."""
    return {
        "imn_m": torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1),
        "imn_s": torch.tensor(IMAGENET_STD).view(1, 3, 1, 1),
        "norm_black": torch.zeros(1, 3, size, size),
    }


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder, decoder, then the densifying layers from the deepest map on, as the original has them."""
    parts = ("sparse_encoder", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens")
    densify = {name: int(name.split(".")[1]) if name.startswith(parts[2:]) else 0 for name in tensors}
    return {
        name: tensors[name] for part in parts for name in sorted(tensors, key=densify.__getitem__)
        if name.startswith(part)
    }  # fmt: skip
