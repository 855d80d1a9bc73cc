"""Tensor names and shapes of other libraries, translated from timm's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor

from sparkmim.data.problems import few

_TORCHVISION_BLOCK = {
    "conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5", "gamma": "layer_scale",
}  # fmt: skip


def torchvision_name(name: str) -> str:
    """Translates the name of a tensor of timm's ResNet or ConvNeXt to torchvision's.

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
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.{_TORCHVISION_BLOCK[match[3]]}{match[4]}"
    return name.replace("head.norm.", "classifier.0.").replace("head.fc.", "classifier.2.")


def convnext_name(name: str, parts: Mapping[str, str]) -> str:
    """Translates timm's name of a ConvNeXt tensor to the original's scheme: `stages.i.j`, `downsample_layers.i`.

    `parts` renames the parts of a block; others keep their names.

    >>> convnext_name("stages.2.blocks.4.mlp.fc1.weight", {"mlp.fc1": "pwconv1"})
    'stages.2.4.pwconv1.weight'
    >>> convnext_name("stem.0.bias", {}), convnext_name("stages.1.downsample.1.bias", {})
    ('downsample_layers.0.0.bias', 'downsample_layers.1.1.bias')
    """
    if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        stage, block, rest = match.groups()
        for timm_part, part in parts.items():
            rest = re.sub(rf"^{re.escape(timm_part)}\b", part, rest)
        return f"stages.{stage}.{block}.{rest}"
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    return re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)


def without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a ResNet or ConvNeXt up to its last feature map."""
    return {name: tensor for name, tensor in tensors.items() if not re.match(r"(fc|head)\.", name)}


def linear_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with pointwise layers as linear, `[out, in]`; timm may have 1×1 convolutions there."""
    pointwise = re.compile(r"\.mlp\.fc\d\.weight$")
    return {name: tensor.flatten(1) if pointwise.search(name) else tensor for name, tensor in tensors.items()}


def shaped_like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """Reshapes a linear layer's weight to that of a 1×1 convolution in its place, and the reverse."""
    if own is not None and own.shape != tensor.shape and own.shape[:2] == tensor.shape[:2]:
        return tensor.view(own.shape) if own.numel() == tensor.numel() else tensor
    return tensor


def without_prefix(tensors: Mapping[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Removes the prefix behind which a network's tensors are named, and what is not behind it; returns the prefix too.

    Wrappers and larger models add one: `module.`, `_orig_mod.`, `backbone.`, `model.encoder_q.`.

    Args:
        own: names in the network.

    Example:
        >>> without_prefix({"backbone.stem.bias": Tensor(), "head.bias": Tensor()}, ["stem.bias"])
        ({'stem.bias': tensor([])}, 'backbone.')
    """
    fitting: Counter[str] = Counter()
    for name in tensors:
        ends = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        fitting.update(name[:end] for end in ends if name[end:] in own)
    prefix = max(fitting, key=lambda prefix: (fitting[prefix], -len(prefix)), default="")
    prefix = prefix if 2 * fitting[prefix] > len(own) else ""  # few names are alike in any two networks
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, prefix


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapts the first convolution `[out, in, *kernel]` to images of other channels, as timm's `adapt_input_conv`.

    One channel gets the sum of all; several get them in turn, scaled so that the sum stays as large.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // before), *[1] * (weight.ndim - 2))[:, :channels] * (before / channels)


def misfit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], spared: Collection[str] = ()) -> str:
    """Sums up what does not fit into a network, and names the first of each kind; empty if all does.

    Args:
        tensors: to be loaded.
        own: tensors in the network.
        spared: names that need not be loaded.
    """
    both = own.keys() & tensors.keys()
    problems = {
        "missing": sorted(own.keys() - tensors.keys() - set(spared)),
        "without a place in the model": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
            for name in both
            if own[name].shape != tensors[name].shape
        ),
    }
    told = [f"{len(names)} {what}: {few(names, 1)}" for what, names in problems.items() if names]
    return "; ".join(told)
