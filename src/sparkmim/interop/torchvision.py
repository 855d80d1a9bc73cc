"""torchvision's names: ResNets are called as in timm, ConvNeXts are not; networks of the user's own as they are."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from sparkmim.interop.network import IN_BOTH_LIBRARIES, Network, check_fit, linear_weights
from sparkmim.training.weights import tensors_of

_BLOCK = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5", "gamma": "layer_scale"}
_HEAD = {"head.norm": "classifier.0", "head.fc": "classifier.2"}


def torchvision_name(name: str) -> str:
    """torchvision's name of a tensor of timm's ResNet or ConvNeXt.

    >>> torchvision_name("stages.1.blocks.0.gamma"), torchvision_name("stages.1.downsample.0.bias")
    ('features.3.0.layer_scale', 'features.2.0.bias')
    >>> torchvision_name("layer1.0.conv1.weight")
    'layer1.0.conv1.weight'
    """
    if name.startswith("stem."):
        return "features.0." + name.removeprefix("stem.")
    if match := re.fullmatch(r"stages\.(\d+)\.downsample\.(.+)", name):
        return f"features.{2 * int(match[1])}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|norm|mlp\.fc1|mlp\.fc2|gamma)(.*)", name):
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.{_BLOCK[match[3]]}{match[4]}"
    for timm_part, part in _HEAD.items():
        if name.startswith(f"{timm_part}."):
            return part + name.removeprefix(timm_part)
    return name


def torchvision_tensors(network: Network) -> dict[str, Tensor]:
    """Under torchvision's names and in its shapes.

    A network of torchvision, or the user's own, keeps all that it has. Of a timm encoder there is no classifier;
    torchvision's then needs `fc`, or a ConvNeXt's `classifier[2]`, set to `nn.Identity()` to load strictly.

    Raises:
        ValueError: if torchvision has no such network.
    """
    from torchvision.models import get_model

    if network.is_own or network.name.startswith("torchvision/"):
        return tensors_of(network.module)
    if network.name not in IN_BOTH_LIBRARIES:
        raise ValueError(
            f"torchvision computes no network as timm's {network.called()} does; use the format timm, or onnx or "
            "torch-export, which take any network"
        )
    if network.weights.channels != 3:
        raise ValueError(f"torchvision's networks take 3 channels, not {network.weights.channels}; use the format timm")
    name, tensors = network.in_timm()
    with torch.device("meta"):
        target = get_model(name, weights=None, **({"num_classes": len(network.classes)} if network.classes else {}))
    if not network.classes:
        if hasattr(target, "fc"):
            target.fc = nn.Identity()
        else:
            target.classifier[2] = nn.Identity()
    shapes = {key: tensor.shape for key, tensor in target.state_dict().items()}
    renamed = {torchvision_name(key): tensor for key, tensor in linear_weights(tensors).items()}
    # Layer scale is [C] in timm, and [C, 1, 1] here.
    renamed = {key: tensor.reshape(shapes.get(key, tensor.shape)) for key, tensor in renamed.items()}
    check_fit(target, renamed, f"torchvision's {name}")
    return renamed
