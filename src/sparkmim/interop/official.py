"""Weights of the original SparK release: reading files, translating names, loading into a `SparK` model.

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

from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.errors import UserError
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import SparK

_LEFTOVERS = {"imn_m", "imn_s", "norm_black", "config"}
"""Entries of released files that the model does not use."""

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
    """Translates the name of an encoder tensor to timm's.

    >>> encoder_name("downsample_layers.1.0.weight"), encoder_name("layer1.0.conv1.weight")
    ('stages.1.downsample.0.weight', 'layer1.0.conv1.weight')
    """
    for pattern, replacement in _CONVNEXT:
        name = re.sub(pattern, replacement, name)
    return name


def parameter_name(name: str, maps: int = 4) -> str:
    """Translates the name of a tensor in the original `module` dictionary to ours.

    Args:
        name: the original name.
        maps: number of feature maps that the model decodes from; the original counts them from the deepest.
    """
    if name.startswith("sparse_encoder.sp_cnn."):
        return "encoder." + encoder_name(name.removeprefix("sparse_encoder.sp_cnn."))
    if match := re.match(r"(densify_norms|densify_projs|mask_tokens)\.(\d+)(.*)", name):
        part = {"densify_norms": "norm", "densify_projs": "project", "mask_tokens": "mask_token"}[match[1]]
        return f"densify.{maps - 1 - int(match[2])}.{part}{match[3]}"
    for pattern, replacement in _DECODER:
        name = re.sub(pattern, replacement, name)
    return name


def translated(module: Mapping[str, Any], maps: int | None = None) -> dict[str, Tensor]:
    """Translates an original `module` dictionary, leaving out what the model does not use.

    Names in an encoder alone, or in a classifier, become timm's.

    Args:
        module: tensors by name.
        maps: number of feature maps that the model decodes from; None for the number of mask tokens.
    """
    if not any(name.startswith("sparse_encoder.") for name in module):
        return {encoder_name(name): tensor for name, tensor in module.items() if name not in _LEFTOVERS}
    maps = maps or sum(name.startswith("mask_tokens.") for name in module)
    return {parameter_name(name, maps): tensor for name, tensor in module.items() if name not in _LEFTOVERS}


def load_into(model: SparK, state_dict: Mapping[str, Any]) -> None:
    """Loads an original `module` dictionary, encoder and decoder, into a model.

    Parameters that pretraining never reaches, such as a classifier's, are not in it and stay as they are.

    Raises:
        UserError: if a tensor is missing, has no place in the model, or has another shape; nothing is loaded then.
    """
    if "module" in state_dict and not isinstance(state_dict["module"], Tensor):
        state_dict = state_dict["module"]
    own = model.state_dict()
    tensors = translated(state_dict, len(model.densify))
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
        raise UserError(f"the weights do not fit this model ({shown})")
    model.load_state_dict({**own, **tensors})


_RESNETS = {
    (2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152",
    (3, 24, 36, 3): "resnet200",
}  # fmt: skip
_CONVNEXTS = {
    ((3, 3, 9, 3), 96): "convnext_tiny", ((3, 3, 27, 3), 96): "convnext_small", ((3, 3, 27, 3), 128): "convnext_base",
    ((3, 3, 27, 3), 192): "convnext_large", ((3, 3, 27, 3), 256): "convnext_xlarge",
}  # fmt: skip


def architecture_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognises a ResNet or ConvNeXt by its blocks per stage and, for a ConvNeXt, the width of its stem.

    Args:
        tensors: the encoder's, under timm's names.

    Returns:
        timm's name of the network, or None.
    """

    def blocks(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    if "layer1.0.conv1.weight" in tensors:
        name = _RESNETS.get(tuple(blocks(rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)))  # type: ignore[arg-type]
        if (name == "resnet18") == ("layer1.0.conv3.weight" in tensors):  # basic blocks have no third convolution
            return None
        return name
    if "stem.0.weight" in tensors:
        depths = tuple(blocks(rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
        return _CONVNEXTS.get((depths, tensors["stem.0.weight"].shape[0]))  # type: ignore[arg-type]
    return None


def read(path: str | Path) -> tuple[dict[str, Tensor], WeightsMetadata]:
    """Reads a file of the original release, or another PyTorch file, without running any code in it.

    Recognised are: encoder and decoder (`*_withdecoder_*_spark_style.pth`), an encoder alone (`*_timm_style.pth`,
    `*_official_style.pth`), a fine-tuned classifier (`*_1kfinetuned_*.pth`), and a plain state dict, also under the key
    `state_dict` or `model`.

    Returns:
        The tensors under our names, and the metadata that content and names give.

    Raises:
        UserError: if the file holds no weights, or unusable metadata.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a PyTorch weight file: {_first_line(error)}") from error
    module = content
    for key in ("module", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            module = content[key]
            break
    named = (
        {name: value for name, value in module.items() if isinstance(value, Tensor)} if isinstance(module, dict) else {}
    )
    if not named or not all(isinstance(name, str) for name in module):
        raise UserError(f"{path} holds no weights: neither tensors by name, nor a `module` entry with them")
    tensors = translated(named)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    config = module.get("config") if isinstance(module.get("config"), dict) else {}
    size = content.get("input_size") or config.get("sparse_encoder.input_size") or 224
    known = {
        "model": architecture_of(encoder),
        "image_size": [size, size] if isinstance(size, int) else size,
        "patch_size": 32,
        "mask_ratio": config.get("mask_ratio", 0.6),
        "channels": 3,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    known |= {key: content[key] for key in ("mean", "std") if isinstance(content.get(key), list)}  # our exports
    if "decoder.head.weight" in tensors:
        known["channels"] = tensors["decoder.head.weight"].shape[0]
        known["patch_size"] = 2 ** len({name.split(".")[2] for name in tensors if name.startswith("decoder.blocks.")})
        known["decoder"] = "spark"
        known["decoder_width"] = tensors["decoder.blocks.0.upsample.weight"].shape[0]
    return tensors, WeightsMetadata.from_json(known, path)


def _first_line(error: Exception) -> str:
    """Returns the first line of a message of PyTorch, which says what happened."""
    return str(error).strip().partition("\n")[0]
