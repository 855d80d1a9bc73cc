"""Detectron2's names of ResNets, in the pickle of arrays that its checkpointer reads; Detectron2 is not needed.

A network of the user's own keeps its names: it is registered there under them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

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
    """Detectron2's name of a tensor of timm's ResNet.

    >>> detectron2_name("bn1.weight"), detectron2_name("layer1.0.downsample.0.weight")
    ('stem.conv1.norm.weight', 'res2.0.shortcut.weight')
    """
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def detectron2_file(network: ExportableNetwork) -> tuple[bytes, int]:
    """The file's content, and how many arrays it holds.

    Of a ResNet six entries per convolution: its weight, and weight, bias, mean, variance and batch counter of its norm.
    So a ResNet-50 of 53 convolutions has 318. The counter has a place in SyncBN; a frozen norm has none, and passes it
    over.

    Raises:
        ValueError: if it is neither an ordinary ResNet nor the user's own.
    """
    arrays = {name: tensor.numpy() for name, tensor in _backbone(network).items()}
    content: dict[str, Any] = {"model": arrays, "__author__": "sparkmim", "matching_heuristics": True}
    return pickle.dumps(content, protocol=4), len(arrays)


def _backbone(network: ExportableNetwork) -> dict[str, Tensor]:
    if network.is_own:
        return network.own_backbone()
    if network.family() != "resnet":
        raise UserError(
            f"detectron2 takes ordinary ResNets, and {network.called()} is none; use mmdet for a ConvNeXt, or onnx for "
            "any network"
        )
    _, tensors = network.in_timm()
    return {detectron2_name(name): tensor for name, tensor in without_head(tensors).items()}
