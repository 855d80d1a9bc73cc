"""Layer-wise learning-rate decay: shallower layers learn more slowly.

A parameter with exponent `e` learns at `rate · decay**e`. Exponents count groups of layers from the classifier, which
has 0, down to the stem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from sparkmim.errors import UserError
from sparkmim.models.classifier import ENCODER_PREFIX, PooledClassifier, head_of
from sparkmim.models.pyramid import PyramidBackbone

MOST_GROUPS = 12
"""Maximum number of layer groups below the classifier for networks that the paper does not cover: as many as
ConvNeXt-S has. With one group per block, the stem of a deep network would hardly learn."""

_RESNET_GROUP = {(4, 6): (2, 3), (4, 23): (2, 3), (8, 36): (4, 4), (24, 36): (4, 4), (30, 48): (5, 6)}
"""Blocks per group in the second and third stage, by their numbers of blocks: the original's settings for
ResNet-50, -101, -152, -200 and -269 (keyu-tian/SparK, `downstream_imagenet/models`)."""

_CONVNEXT_GROUP = 3
"""Blocks per group in the third stage of a ConvNeXt, as in ConvNeXt's own fine-tuning (ibid.)."""


def layer_decay_exponents(model: nn.Module) -> dict[str, int]:
    """Returns how many times the learning rate of each parameter is decayed.

    ResNets and ConvNeXts have the groups of the original release: one per stage, except that the third stage (of
    ConvNeXts) or the second and third (of ResNets) are cut into groups of a few blocks. In other networks, layers in
    order of depth, by timm's `group_matcher` or by the order of modules, are cut into even groups, at most 12.

    Args:
        model: a classifier; timm's, torchvision's, a `PooledClassifier`, or any other.

    Returns:
        Exponents by the name of each parameter: 0 for the classifier.
    """
    if isinstance(model, PooledClassifier):
        inner = _of_encoder(model.encoder, model.hierarchy.unreached)
        exponents = {ENCODER_PREFIX + name: exponent for name, exponent in inner.items()}
        return {name: exponents.get(name, 0) for name, _ in model.named_parameters()}
    return _of_paper(model) or _by_depth(model)


def detector_layer_decay_exponents(model: nn.Module) -> dict[str, int]:
    """Returns how many times the learning rate of each parameter is decayed in detection and segmentation.

    The encoder's layers have the exponents that they have below a classifier; what is new, and what no feature map
    depends on, learns at the full rate. For ConvNeXts these are the groups of the paper's detection (ConvNeXt's
    `object_detection/mmcv_custom/layer_decay_optimizer_constructor.py` with `num_layers` 12). For the ResNet-50 the
    original's detection (`downstream_d2/lr_decay.py`) differs from its classification in one thing: the second stage
    is one group, so that this stage's first half and all before it is decayed once less.

    Args:
        model: a detector or segmenter; its `backbone` is a `PyramidBackbone`.

    Returns:
        Exponents by the name of each parameter.

    Raises:
        ValueError: if the model has no such backbone.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, PyramidBackbone):
        raise UserError(f"{type(model).__name__} has no PyramidBackbone; build it with create_detector")
    unreached = set(backbone.hierarchy.unreached)
    inner = _of_paper(backbone.encoder) or _of_encoder(backbone.encoder, backbone.hierarchy.unreached)
    exponents = {f"backbone.encoder.{name}": exponent for name, exponent in inner.items() if name not in unreached}
    return {name: exponents.get(name, 0) for name, _ in model.named_parameters()}


def _of_paper(model: nn.Module) -> dict[str, int] | None:
    """Returns the groups of the original release; None for networks that it does not cover."""
    names = [name for name, _ in model.named_parameters()]
    if re.match(r"resnet|ResNet", type(model).__name__) and hasattr(model, "layer4"):
        return dict(zip(names, _resnet(model, names), strict=True))
    if type(model).__name__ == "ConvNeXt" and hasattr(model, "stages"):
        return dict(zip(names, _convnext(model, names), strict=True))
    return None


def _resnet(model: Any, names: Sequence[str]) -> list[int]:
    second, third = len(model.layer2), len(model.layer3)
    # For others, two groups in each: half of the blocks, as in a ResNet-50.
    in_second, in_third = _RESNET_GROUP.get((second, third), (-(-second // 2), -(-third // 2)))
    in_second, in_third = max(1, in_second), max(1, in_third)
    groups_second, groups_third = -(-second // in_second), -(-third // in_third)
    last = 2 + groups_second + groups_third  # the group of layer4
    head = set(head_of(model))

    def group(name: str) -> int:
        if match := re.match(r"layer(\d)\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            return (1, 2 + block // in_second, 2 + groups_second + block // in_third, last)[stage - 1]
        return last + 1 if name in head else 0

    return [last + 1 - group(name) for name in names]


def _convnext(model: Any, names: Sequence[str]) -> list[int]:
    blocks = len(model.stages[2].blocks)
    last = 12 if blocks > 9 else 6  # the group of the fourth stage

    def group(name: str) -> int:
        if name.startswith("stem."):
            return 0
        match = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
        if match is None:
            return last + 1  # head, and the norm before it
        stage, block = int(match[1]), int(match[2] or 0)
        return (1, 2, min(3 + block // _CONVNEXT_GROUP, last), last)[stage]

    return [last + 1 - group(name) for name in names]


def _by_depth(model: nn.Module) -> dict[str, int]:
    """Cuts the layers below the head into even groups."""
    names = [name for name, _ in model.named_parameters()]
    head = set(head_of(model))
    below = [name for name in names if name not in head]
    layers = _layers(model, below)
    count = max(layers.values(), default=-1) + 1
    groups = min(count, MOST_GROUPS)
    exponents = {name: groups - layers[name] * groups // count for name in below}
    return {name: exponents.get(name, 0) for name in names}


def _layers(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Numbers parameters by depth, without gaps."""
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        found = group_parameters(model, matcher(coarse=False), reverse=True)
        numbers = {name: int(found[name]) for name in names}
    else:
        # Modules are made in the order in which they are used, as a rule; those with one parent are one block.
        order: dict[str, int] = {}
        numbers = {name: order.setdefault(_block_of(name), len(order)) for name in names}
    used = sorted(set(numbers.values()))
    return {name: used.index(number) for name, number in numbers.items()}


def _block_of(name: str) -> str:
    """Returns the name of the block of a parameter: the parent of its layer, or the layer itself in a sequence.

    Example:
        >>> _block_of("stage1.conv1.weight"), _block_of("features.3.weight")
        ('stage1', 'features.3')
    """
    layer = name.rpartition(".")[0]
    parent, _, last = layer.rpartition(".")
    return layer if not parent or last.isdigit() else parent


def _of_encoder(encoder: nn.Module, unreached: Sequence[str]) -> dict[str, int]:
    """Returns exponents of a network without a classifier: 1 for its deepest layers, 0 for unreached parameters."""
    names = [name for name, _ in encoder.named_parameters()]
    layers = _layers(encoder, [name for name in names if name not in set(unreached)])
    count = max(layers.values(), default=-1) + 1
    groups = min(count, MOST_GROUPS)
    return {name: groups - layers[name] * groups // count if name in layers else 0 for name in names}
