"""Export to Detectron2: ResNets under its names, in the pickle that its checkpointer reads.

Detectron2 need not be installed. A custom network keeps its names.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

from sparkmim.errors import UserError
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.interop.names import without_head

_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]  # fmt: skip


def detectron2_name(name: str) -> str:
    """Translates the name of a tensor of timm's ResNet to Detectron2's.

    >>> detectron2_name("bn1.weight"), detectron2_name("layer1.0.downsample.0.weight")
    ('stem.conv1.norm.weight', 'res2.0.shortcut.weight')
    """
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def detectron2_file(network: ExportableNetwork) -> tuple[bytes, int]:
    """Returns the file's content and the number of its arrays.

    A ResNet has six arrays per convolution: its weight, and weight, bias, mean, variance and batch counter of its norm;
    318 in a ResNet-50. Detectron2's SyncBN takes the counter, its frozen norm ignores it.
    """
    if network.is_custom:
        tensors = network.backbone_tensors()
    elif network.family == "resnet":
        tensors = {detectron2_name(name): tensor for name, tensor in without_head(network.timm_tensors()[1]).items()}
    else:
        raise UserError(
            f"detectron2 takes ordinary ResNets, and {network.label} is not one; use mmdet for a ConvNeXt, or onnx for "
            "any network"
        )
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    content: dict[str, Any] = {"model": arrays, "__author__": "sparkmim", "matching_heuristics": True}
    return pickle.dumps(content, protocol=4), len(arrays)
