"""Export to OpenMMLab (MMDetection, MMPretrain): ResNets and ConvNeXts under its names, as a checkpoint.

Its libraries need not be installed. A custom network keeps its names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparkmim._version import __version__
from sparkmim.errors import UserError
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.interop.names import convnext_name, linear_weights, without_head
from sparkmim.interop.weights import tensors_of
from sparkmim.models.classifier import PooledClassifier, encoder_of

_CONVNEXT = {
    "conv_dw": "depthwise_conv", "mlp.fc1": "pointwise_conv1", "mlp.fc2": "pointwise_conv2",
    "mlp.grn.weight": "grn.gamma", "mlp.grn.bias": "grn.beta",
}  # fmt: skip


def openmmlab_name(name: str) -> str:
    """Translates the name of a tensor of timm's ResNet or ConvNeXt to that in MMPretrain's classifier.

    >>> openmmlab_name("layer1.0.bn1.weight"), openmmlab_name("fc.bias")
    ('backbone.layer1.0.bn1.weight', 'head.fc.bias')
    >>> openmmlab_name("stages.0.blocks.1.mlp.fc1.bias"), openmmlab_name("head.norm.bias")
    ('backbone.stages.0.1.pointwise_conv1.bias', 'backbone.norm3.bias')
    """
    if name.startswith(("fc.", "head.fc.")):
        return f"head.fc.{name.rpartition('.')[2]}"
    if name.startswith("head.norm."):
        return name.replace("head.norm.", "backbone.norm3.")
    return "backbone." + convnext_name(name, _CONVNEXT)


def openmmlab_checkpoint(network: ExportableNetwork, detection: bool) -> dict[str, Any]:
    """Returns the content of a `.pth` file: `state_dict` and `meta`.

    `detection` leaves out the layers after the last map: a classifier's head, or the untrained last norm of a ConvNeXt.
    """
    name, tensors = _custom(network, detection) if network.is_custom else _known(network, detection)
    meta: dict[str, Any] = {"sparkmim_version": __version__, "model": name}
    if network.classes and not detection:
        meta["dataset_meta"] = {"classes": network.classes}
    return {"state_dict": tensors, "meta": meta}


def _custom(network: ExportableNetwork, detection: bool) -> tuple[str, dict[str, Tensor]]:
    """Returns name and tensors of a custom network; a `PooledClassifier`'s head becomes that of `LinearClsHead`."""
    tensors = network.backbone_tensors() if detection else tensors_of(encoder_of(network.module))
    named = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if isinstance(network.module, PooledClassifier) and not detection:
        named |= {f"head.fc.{name}": tensor for name, tensor in tensors_of(network.module.head).items()}
    return network.factory, named


def _known(network: ExportableNetwork, detection: bool) -> tuple[str, dict[str, Tensor]]:
    if network.family is None:
        raise UserError(
            f"{'mmdet' if detection else 'mmpretrain'} takes ordinary ResNets and ConvNeXts, and {network.label} is "
            "neither; use onnx or torch-export, which take any network"
        )
    name, tensors = network.timm_tensors()
    tensors = linear_weights(without_head(tensors) if detection else tensors)
    return name, {openmmlab_name(key): tensor for key, tensor in tensors.items()}
