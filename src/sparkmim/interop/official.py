"""Weights of the original SparK release: names, and loading them into a `SparK` model.

A released `*_withdecoder_1kpretrained_spark_style.pth` holds encoder and decoder under the key `module`;
its ResNets carry timm's names, its ConvNeXts those of the original ConvNeXt release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkmim.models import SparK

_LEFTOVERS = {"imn_m", "imn_s", "norm_black", "config"}
"""Entries of released files that mean nothing to the model."""

_DECODER = [
    (r"dense_decoder\.dec\.(\d+)\.up_sample\.", r"decoder.blocks.\1.upsample."),
    (r"dense_decoder\.dec\.(\d+)\.conv\.0\.", r"decoder.blocks.\1.conv1."),
    (r"dense_decoder\.dec\.(\d+)\.conv\.1\.", r"decoder.blocks.\1.norm1."),
    (r"dense_decoder\.dec\.(\d+)\.conv\.3\.", r"decoder.blocks.\1.conv2."),
    (r"dense_decoder\.dec\.(\d+)\.conv\.4\.", r"decoder.blocks.\1.norm2."),
    (r"dense_decoder\.proj\.", r"decoder.head."),
]
_CONVNEXT = [
    (r"^downsample_layers\.0\.", r"stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv1\.", r"stages.\1.blocks.\2.mlp.fc1."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv2\.", r"stages.\1.blocks.\2.mlp.fc2."),
    (r"^stages\.(\d+)\.(\d+)\.(norm|gamma)", r"stages.\1.blocks.\2.\3"),
]


def encoder_name(name: str) -> str:
    """timm's name of an encoder tensor of the original release.

    >>> encoder_name("downsample_layers.1.0.weight"), encoder_name("layer1.0.conv1.weight")
    ('stages.1.downsample.0.weight', 'layer1.0.conv1.weight')
    """
    for pattern, replacement in _CONVNEXT:
        name = re.sub(pattern, replacement, name)
    return name


def parameter_name(name: str, maps: int = 4) -> str:
    """Our name of a tensor of the original `module` dictionary.

    Args:
        name: the original name.
        maps: how many feature maps the model decodes from; the original numbers them from the deepest.
    """
    if name.startswith("sparse_encoder.sp_cnn."):
        return "encoder." + encoder_name(name.removeprefix("sparse_encoder.sp_cnn."))
    if match := re.match(r"(densify_norms|densify_projs|mask_tokens)\.(\d+)(.*)", name):
        part = {"densify_norms": "norm", "densify_projs": "project", "mask_tokens": "mask_token"}[match[1]]
        return f"densify.{maps - 1 - int(match[2])}.{part}{match[3]}"
    for pattern, replacement in _DECODER:
        name = re.sub(pattern, replacement, name)
    return name


def load_into(model: SparK, state_dict: Mapping[str, Any]) -> None:
    """Loads an original `module` dictionary, encoder and decoder, into a model.

    Parameters that pretraining never reaches (a classifier) are not in such a dictionary and stay as they are.

    Raises:
        ValueError: if a tensor is missing, has no place in the model, or has another shape; nothing is loaded then.
    """
    if "module" in state_dict and not isinstance(state_dict["module"], Tensor):
        state_dict = state_dict["module"]
    maps = len(model.densify)
    own = model.state_dict()
    tensors = {parameter_name(name, maps): tensor for name, tensor in state_dict.items() if name not in _LEFTOVERS}
    for name, tensor in tensors.items():  # a Linear of the original may be a 1×1 convolution here
        if name in own and tensor.shape == own[name].shape[:2] and tensor.numel() == own[name].numel():
            tensors[name] = tensor.view(own[name].shape)
    optional = set(model.unreached_parameters)
    problems = {
        "missing": sorted(own.keys() - tensors.keys() - optional),
        "without a place in the model": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ),
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"the weights do not fit this model ({shown})")
    model.load_state_dict({**own, **tensors})


def read(path: str | Path) -> dict[str, Any]:
    """Reads a released file's `module` dictionary, without running any code in it.

    Raises:
        ValueError: if the file is no original SparK file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a PyTorch weight file: {_first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise ValueError(f"{path} has no `module` entry, as original SparK files with decoder have")
    module: dict[str, Any] = content["module"]
    return module


def _first_line(error: Exception) -> str:
    """PyTorch explains itself over several lines; the first says what happened."""
    return str(error).strip().partition("\n")[0]
