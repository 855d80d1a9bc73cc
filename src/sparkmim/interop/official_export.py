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
from sparkmim.interop.official import CONVNEXT, DECODER, DENSIFY, decoder_blocks


def original_name(name: str, maps: int = 4) -> str:
    """Translates the name of a tensor of `SparK`, with `maps` feature maps, to the original's.

    >>> original_name("densify.3.project.bias"), original_name("decoder.blocks.1.norm2.bias")
    ('densify_projs.0.bias', 'dense_decoder.dec.1.conv.4.bias')
    >>> original_name("encoder.stages.1.blocks.0.mlp.fc1.bias")
    'sparse_encoder.sp_cnn.stages.1.0.pwconv1.bias'
    """
    if name.startswith("encoder."):
        return "sparse_encoder.sp_cnn." + convnext_name(name.removeprefix("encoder."), CONVNEXT)
    if match := re.fullmatch(r"densify\.(\d+)\.(norm|project|mask_token)(.*)", name):
        return f"{DENSIFY[match[2]]}.{maps - 1 - int(match[1])}{match[3]}"
    if match := re.fullmatch(r"decoder\.blocks\.(\d+)\.(\w+)\.(.+)", name):
        return f"dense_decoder.dec.{match[1]}.{DECODER[match[2]]}.{match[3]}"
    return name.replace("decoder.head.", "dense_decoder.proj.")


def original_file(network: ExportableNetwork) -> dict[str, Any]:
    """Returns the content of a `.pth` file.

    Pretrained weights give encoder and decoder under `module`, with the other keys of the release
    (`*_withdecoder_1kpretrained_spark_style.pth`). An encoder or classifier gives the encoder alone at the top level: a
    ResNet under timm's names (`*_timm_style.pth`), a ConvNeXt under those of its own release (`*_official_style.pth`).
    A custom network keeps its names; register it in the original's code to use it there.
    """
    known = network.weights.metadata
    name, encoder = _encoder(network)
    if network.weights.kind != "pretrained":
        return dict(encoder)

    size, channels = known.image_size or (), known.channels
    # A custom network has to be registered in the original's code, where its decoder can be given other channels too.
    usable = known.decoder in (None, "spark") and (channels == 3 or network.is_custom)
    remedy = "export the encoder alone (its file encoder.safetensors)"
    if not usable or len(size) != 2 or size[0] != size[1]:
        raise UserError(f"the original SparK has one decoder, spark, and square images of 3 channels; {remedy}")
    tensors = network.weights.tensors
    maps = sum(key.endswith(".mask_token") for key in tensors)
    stride = 2 ** decoder_blocks(tensors)
    if known.patch_size not in (None, stride):
        raise UserError(
            f"the original SparK hides patches of the network's stride, {stride}, not of {known.patch_size}; {remedy}"
        )
    if known.stages and (deepest := network.weights.hierarchy_of(network.module, whole=True).stride) != stride:
        raise UserError(
            f"the original SparK reconstructs from the deepest map, at stride {deepest}, but this was trained at "
            f"stride {stride} (--stages); {remedy}"
        )
    given = {f"sparse_encoder.sp_cnn.{key}": tensor for key, tensor in encoder.items()}
    decoder = {key: tensor.contiguous() for key, tensor in tensors.items() if not key.startswith("encoder.")}
    given |= {original_name(key, maps): tensor for key, tensor in decoder.items()}
    config = {
        "mask_ratio": 0.6 if known.mask_ratio is None else known.mask_ratio,
        "densify_norm_str": "bn" if "densify.0.norm.running_mean" in tensors else "ln",
        "sbn": False,
        "hierarchy": maps,
        "sparse_encoder.input_size": size[0],
        "dense_decoder.width": tensors["decoder.blocks.0.upsample.weight"].shape[0],
    }
    unused = {"imn_m": (1, 1), "imn_s": (1, 1), "norm_black": size}  # buffers that the original registers
    module = {name: torch.zeros(1, channels, *shape) for name, shape in unused.items()}
    # The release has no such keys: its images are normalised as ImageNet's.
    usual = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    colours = {key: list(values) for key, values in known.given("mean", "std").items()}
    others = {key: values for key, values in colours.items() if values != usual[key]}
    return {
        "args": "",
        "input_size": size[0],
        "arch": name,
        "epoch": int(known.figures.get("epoch", 0)),
        "performance_desc": "",
        "module": {**module, **_in_order(given), "config": config},
        "optimizer": {},
        "is_pretrain": True,
        **others,
    }


def _encoder(network: ExportableNetwork) -> tuple[str, dict[str, Tensor]]:
    """Returns the network's name and tensors as the original names them."""
    if network.is_custom:
        return network.factory, network.backbone_tensors()
    if network.family is None or network.name.startswith("convnextv2"):
        raise UserError(
            f"the original SparK takes ordinary ResNets and ConvNeXts (V1), and {network.label} is neither; use "
            "timm, onnx or torch-export"
        )
    name, tensors = network.timm_tensors()
    tensors = linear_weights(without_head(tensors))
    return name, {convnext_name(key, CONVNEXT): tensor for key, tensor in tensors.items()}


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorts tensors as the original does: encoder, decoder, then the densifying layers from the deepest map on."""
    parts = ("sparse_encoder", "dense_decoder", "densify_norms", "densify_projs", "mask_tokens")
    densify = {name: int(name.split(".")[1]) if name.startswith(parts[2:]) else 0 for name in tensors}
    return {
        name: tensors[name] for part in parts for name in sorted(tensors, key=densify.__getitem__)
        if name.startswith(part)
    }  # fmt: skip
