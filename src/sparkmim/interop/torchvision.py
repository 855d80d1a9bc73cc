"""torchvision's names: ResNets are called as in timm, ConvNeXts are not; networks of the user's own as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.interop.exportable import IN_BOTH_LIBRARIES, ExportableNetwork, check_fit
from sparkmim.interop.names import linear_weights, torchvision_name
from sparkmim.interop.weights import tensors_of


def torchvision_tensors(network: ExportableNetwork) -> dict[str, Tensor]:
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
        raise UserError(
            f"torchvision computes no network as timm's {network.called()} does; use the format timm, or onnx or "
            "torch-export, which take any network"
        )
    if network.weights.channels != 3:
        raise UserError(f"torchvision's networks take 3 channels, not {network.weights.channels}; use the format timm")
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
