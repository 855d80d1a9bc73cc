"""Weights of the original SparK release: reading files, translating names, loading into a `SparK` model.

A released `*_withdecoder_1kpretrained_spark_style.pth` holds encoder and decoder under the key `module`;
its ResNets carry timm's names, its ConvNeXts those of the original ConvNeXt release.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.errors import UserError
from sparkmim.interop import fcmae
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.names import misfit, shaped_like
from sparkmim.interop.unreadable import why_unreadable
from sparkmim.models import SparK

_LEFTOVERS = {"imn_m", "imn_s", "norm_black", "config"}
"""Entries of released files that the model does not use."""

CONVNEXT = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
DENSIFY = {"norm": "densify_norms", "project": "densify_projs", "mask_token": "mask_tokens"}
DECODER = {"upsample": "up_sample", "conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}
"""The original's names of a layer's parts, by ours."""


def encoder_name(name: str) -> str:
    """Translates the name of an encoder tensor to timm's.

    >>> encoder_name("downsample_layers.1.0.weight"), encoder_name("layer1.0.conv1.weight")
    ('stages.1.downsample.0.weight', 'layer1.0.conv1.weight')
    """
    name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", name)
    for ours, theirs in {**CONVNEXT, **fcmae.GRN, "norm": "norm", "gamma": "gamma"}.items():
        name = re.sub(rf"^stages\.(\d+)\.(\d+)\.{theirs}\b", rf"stages.\1.blocks.\2.{ours}", name)
    return name


def parameter_name(name: str, maps: int = 4) -> str:
    """Translates the name of a tensor in the original `module` dictionary to ours.

    `maps` is the number of feature maps that the model decodes from; the original counts them from the deepest.
    """
    if name.startswith("sparse_encoder.sp_cnn."):
        return "encoder." + encoder_name(name.removeprefix("sparse_encoder.sp_cnn."))
    for ours, theirs in DENSIFY.items():
        if match := re.fullmatch(rf"{theirs}\.(\d+)(.*)", name):
            return f"densify.{maps - 1 - int(match[1])}.{ours}{match[2]}"
    for ours, theirs in DECODER.items():
        if match := re.fullmatch(rf"dense_decoder\.dec\.(\d+)\.{theirs}\.(.+)", name):
            return f"decoder.blocks.{match[1]}.{ours}.{match[2]}"
    return name.replace("dense_decoder.proj.", "decoder.head.")


def translated(module: Mapping[str, Any], maps: int | None = None) -> dict[str, Tensor]:
    """Translates an original `module` dictionary, or one of FCMAE, leaving out what the model does not use.

    Names in an encoder alone, or in a classifier, become timm's. `maps` as for `parameter_name`; None for the number of
    mask tokens.
    """
    used = {name: tensor for name, tensor in module.items() if name not in _LEFTOVERS}
    if fcmae.is_autoencoder(used):
        encoder, decoder = fcmae.parts(used)
        named = {f"encoder.{name}": tensor for name, tensor in translated(encoder).items()}
        return named | {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    if not any(name.startswith("sparse_encoder.") for name in used):
        return {encoder_name(name): fcmae.flat_grn(name, tensor) for name, tensor in used.items()}
    maps = maps or sum(name.startswith("mask_tokens.") for name in used)
    return {parameter_name(name, maps): tensor for name, tensor in used.items()}


def load_into(model: SparK, state_dict: Mapping[str, Any]) -> None:
    """Loads an original `module` dictionary, encoder and decoder, into a model.

    Parameters that pretraining never reaches, such as a classifier's, are not in it and stay as they are. If a tensor
    is missing, has no place in the model, or has another shape, raises UserError and loads nothing.
    """
    if "module" in state_dict and not isinstance(state_dict["module"], Tensor):
        state_dict = state_dict["module"]
    own = model.state_dict()
    given = translated(state_dict, len(model.densify))
    tensors = {name: shaped_like(tensor, own.get(name)) for name, tensor in given.items()}
    if told := misfit(tensors, own, model.unreached_parameters):
        raise UserError(f"the weights do not fit this model ({told})")
    model.load_state_dict({**own, **tensors})


_RESNETS = {
    (2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152",
    (3, 24, 36, 3): "resnet200",
}  # fmt: skip
_CONVNEXTS = {
    ((3, 3, 9, 3), 96): "convnext_tiny", ((3, 3, 27, 3), 96): "convnext_small", ((3, 3, 27, 3), 128): "convnext_base",
    ((3, 3, 27, 3), 192): "convnext_large", ((3, 3, 27, 3), 256): "convnext_xlarge",
}  # fmt: skip
_CONVNEXTS_V2 = {
    ((2, 2, 6, 2), 40): "convnextv2_atto", ((2, 2, 6, 2), 48): "convnextv2_femto",
    ((2, 2, 6, 2), 64): "convnextv2_pico", ((2, 2, 8, 2), 80): "convnextv2_nano",
    ((3, 3, 9, 3), 96): "convnextv2_tiny", ((3, 3, 27, 3), 128): "convnextv2_base",
    ((3, 3, 27, 3), 192): "convnextv2_large", ((3, 3, 27, 3), 352): "convnextv2_huge",
}  # fmt: skip


def architecture_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognises a ResNet or ConvNeXt by its blocks per stage and, for a ConvNeXt, the width of its stem.

    Takes the encoder's tensors under timm's names; returns timm's name of the network.
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
        known = _CONVNEXTS_V2 if "stages.0.blocks.0.mlp.grn.weight" in tensors else _CONVNEXTS
        return known.get((depths, tensors["stem.0.weight"].shape[0]))  # type: ignore[arg-type]
    return None


def read(path: str | Path) -> tuple[dict[str, Tensor], WeightsMetadata]:
    """Reads a file of the original release, or another PyTorch file, without running any code in it.

    Recognised are: encoder and decoder (`*_withdecoder_*_spark_style.pth`), an encoder alone (`*_timm_style.pth`,
    `*_official_style.pth`), a fine-tuned classifier (`*_1kfinetuned_*.pth`), ConvNeXt V2's files with and without the
    decoder of FCMAE, and a plain state dict, also under the key `state_dict` or `model`. Returns the tensors under our
    names, and the metadata that content and names give.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} {why_unreadable(Path(path), error)}") from error
    content = content if isinstance(content, dict) else {}
    inner = (content.get(key) for key in ("module", "state_dict", "model"))
    module = next((value for value in inner if isinstance(value, dict)), content)
    named = {name: value for name, value in module.items() if isinstance(value, Tensor)}
    if not named or not all(isinstance(name, str) for name in module):
        raise UserError(f"{path} holds no weights: neither tensors by name, nor a `module` entry with them")
    tensors = translated(named)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    config = value if isinstance(value := module.get("config"), dict) else {}
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
    if fcmae.is_autoencoder(named):
        channels, patch_size = fcmae.pixels(named)
        width = tensors["decoder.mask_token"].shape[1]
        known |= {"channels": channels, "patch_size": patch_size, "decoder": "fcmae", "decoder_width": width}
    elif "decoder.head.weight" in tensors:
        known |= {
            "channels": tensors["decoder.head.weight"].shape[0],
            "patch_size": 2 ** decoder_blocks(tensors),
            "decoder": "spark",
            "decoder_width": tensors["decoder.blocks.0.upsample.weight"].shape[0],
        }
    return tensors, WeightsMetadata.from_json(known, path)


def decoder_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Counts the decoder's blocks, each of which doubles the resolution."""
    return len({name.split(".")[2] for name in tensors if name.startswith("decoder.blocks.")})
