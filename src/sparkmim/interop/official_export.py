"""Export to files of the original SparK release; `official` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.errors import UserError
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.interop.names import convnext_name, linear_weights, without_head

_CONVNEXT = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
_DENSIFY = {"norm": "densify_norms", "project": "densify_projs", "mask_token": "mask_tokens"}
_DECODER = {"upsample": "up_sample", "conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}


def original_name(name: str, maps: int = 4) -> str:
    """Translates the name of a tensor of `SparK` to the original's.

    Args:
        name: ours; an encoder's is `encoder.` and timm's name.
        maps: number of feature maps that the model decodes from; the original counts them from the deepest.

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


def original_file(network: ExportableNetwork) -> dict[str, Any]:
    """Returns the content of a `.pth` file.

    Pretrained weights give encoder and decoder under `module`, with the other keys of the release
    (`*_withdecoder_1kpretrained_spark_style.pth`). An encoder or classifier gives the encoder alone at the top level: a
    ResNet under timm's names (`*_timm_style.pth`), a ConvNeXt under those of its own release (`*_official_style.pth`).
    A custom network keeps its names; register it in the original's code to use it there.

    Raises:
        UserError: if the original has no such network or decoder, or the images do not have three channels.
    """
    known = network.weights.metadata
    name, encoder = _encoder(network)
    if network.weights.kind != "pretrained":
        return dict(encoder)

    size, channels = known.image_size or (), known.channels
    # A custom network has to be registered in the original's code, where its decoder can be given other channels too.
    if known.decoder not in (None, "spark") or len({*size}) != 1 or len(size) != 2 or (
        channels != 3 and not network.is_custom
    ):  # fmt: skip
        raise UserError(
            "the original SparK has one decoder, spark, and square images of 3 channels; export the encoder alone "
            "(its file encoder.safetensors)"
        )
    tensors = network.weights.tensors
    maps = sum(key.endswith(".mask_token") for key in tensors)
    blocks = len({key.split(".")[2] for key in tensors if key.startswith("decoder.blocks.")})
    if known.patch_size not in (None, 2**blocks):
        raise UserError(
            f"the original SparK hides patches of the network's stride, {2**blocks}, not of {known.patch_size}; "
            "export the encoder alone (its file encoder.safetensors)"
        )
    if known.stages and (stride := network.weights.hierarchy_of(network.module, whole=True).stride) != 2**blocks:
        raise UserError(
            f"the original SparK reconstructs from the deepest map, at stride {stride}, but this was trained at stride "
            f"{2**blocks} (--stages); export the encoder alone (its file encoder.safetensors)"
        )
    given = {f"sparse_encoder.sp_cnn.{key}": tensor for key, tensor in encoder.items()}
    given |= {
        original_name(key, maps): tensor.contiguous()
        for key, tensor in tensors.items()
        if not key.startswith("encoder.")
    }
    config = {
        "mask_ratio": 0.6 if known.mask_ratio is None else known.mask_ratio,
        "densify_norm_str": "bn" if "densify.0.norm.running_mean" in tensors else "ln",
        "sbn": False,
        "hierarchy": maps,
        "sparse_encoder.input_size": size[0],
        "dense_decoder.width": tensors["decoder.blocks.0.upsample.weight"].shape[0],
    }
    module = {**_unused(size[0], channels), **_in_order(given)}
    # The release has no such keys: its images are normalised as ImageNet's.
    others = {
        key: list(values)
        for key, values, usual in (("mean", known.mean, IMAGENET_MEAN), ("std", known.std, IMAGENET_STD))
        if values and list(values) != list(usual)
    }
    return {
        "args": "",
        "input_size": size[0],
        "arch": name,
        "epoch": int(known.figures.get("epoch", 0)),
        "performance_desc": "",
        "module": {**module, "config": config},
        "optimizer": {},
        "is_pretrain": True,
        **others,
    }


def _encoder(network: ExportableNetwork) -> tuple[str, dict[str, Tensor]]:
    """Returns the original's name of the network, and its tensors under the names that it uses."""
    if network.is_custom:
        return network.factory, network.backbone_tensors()
    if network.family is None or network.name.startswith("convnextv2"):
        raise UserError(
            f"the original SparK takes ordinary ResNets and ConvNeXts (V1), and {network.label} is neither; use "
            "timm, onnx or torch-export"
        )
    name, tensors = network.timm_tensors()
    return name, {
        convnext_name(key, _CONVNEXT): tensor for key, tensor in linear_weights(without_head(tensors)).items()
    }


def _unused(size: int, channels: int) -> dict[str, Tensor]:
    """Returns buffers that the original registers but does not use."""
    shapes = {"imn_m": (1, 1), "imn_s": (1, 1), "norm_black": (size, size)}
    return {name: torch.zeros(1, channels, *shape) for name, shape in shapes.items()}


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorts tensors as the original does: encoder, decoder, then the densifying layers from the deepest map on."""
    parts = ("sparse_encoder", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens")
    densify = {name: int(name.split(".")[1]) if name.startswith(parts[2:]) else 0 for name in tensors}
    return {
        name: tensors[name] for part in parts for name in sorted(tensors, key=densify.__getitem__)
        if name.startswith(part)
    }  # fmt: skip
