"""Export to torchvision, whose ResNets have timm's names, and ConvNeXts their own. A custom network keeps its names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.interop.exportable import IN_BOTH_LIBRARIES, ExportableNetwork, check_fit
from sparkmim.interop.names import linear_weights, torchvision_name
from sparkmim.interop.weights import tensors_of


def torchvision_tensors(network: ExportableNetwork) -> dict[str, Tensor]:
    """Returns the tensors under torchvision's names and in its shapes.

    A timm encoder has no classifier: to load it strictly, set `fc` of torchvision's network, or `classifier[2]` of a
    ConvNeXt, to `nn.Identity()`.
    """
    from torchvision.models import get_model

    if network.is_custom or network.name.startswith("torchvision/"):
        return tensors_of(network.module)
    if network.name not in IN_BOTH_LIBRARIES:
        raise UserError(
            f"torchvision has no network equivalent to timm's {network.label}; use the format timm, or onnx or "
            "torch-export, which take any network"
        )
    if network.weights.channels != 3:
        raise UserError(f"torchvision's networks take 3 channels, not {network.weights.channels}; use the format timm")
    name, tensors = network.timm_tensors()
    with torch.device("meta"):
        target = get_model(name, weights=None, num_classes=len(network.classes or ()) or 1000)
    if not network.classes and hasattr(target, "fc"):
        target.fc = nn.Identity()
    elif not network.classes:
        target.classifier[2] = nn.Identity()
    shapes = {key: tensor.shape for key, tensor in target.state_dict().items()}
    renamed = {torchvision_name(key): tensor for key, tensor in linear_weights(tensors).items()}
    # Layer scale is [C] in timm, and [C, 1, 1] here.
    renamed = {key: tensor.reshape(shapes.get(key, tensor.shape)) for key, tensor in renamed.items()}
    check_fit(target, renamed, f"torchvision's {name}")
    return renamed
