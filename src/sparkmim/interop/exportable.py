"""A network to export: its module, and its tensors under timm's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.interop.names import torchvision_name
from sparkmim.interop.weights import Weights, open_weights, tensors_of
from sparkmim.models.classifier import PooledClassifier, encoder_of
from sparkmim.models.encoders import own_module

Family = Literal["resnet", "convnext"]

IN_BOTH_LIBRARIES = frozenset({
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "convnext_tiny", "convnext_small", "convnext_base",
    "convnext_large",
})  # fmt: skip
"""Networks with the same name and computation in timm and torchvision."""

_PLAIN_RESNETS = {name for name in IN_BOTH_LIBRARIES if not name.startswith("convnext")} | {"resnet200"}
_PLAIN_CONVNEXT = re.compile(r"convnext(v2)?_(atto|femto|pico|nano|tiny|small|base|large|xlarge|huge)")


@dataclass(frozen=True)
class ExportableNetwork:
    """A network with its weights: a classifier if they are a classifier's, else an encoder."""

    weights: Weights
    name: str  # timm's without a tag, `torchvision/NAME`, `file.py:factory`, or "" if unknown
    module: nn.Module  # in evaluation mode
    classes: list[str] | None  # None for an encoder

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.name or type(self.module).__name__

    @property
    def is_custom(self) -> bool:
        """Whether the network comes from the user's code, so that its tensors keep their names in every format."""
        return ".py:" in self.name

    @property
    def factory(self) -> str:
        """Name of the function that makes a custom network."""
        return self.name.rpartition(":")[2]

    @property
    def family(self) -> Family | None:
        """`resnet` (ResNeXt and wide ResNet too) or `convnext` (V2 too) for the ordinary ones; None for all others."""
        name = self.name.removeprefix("torchvision/")
        if name in _PLAIN_RESNETS:
            return "resnet"
        return "convnext" if _PLAIN_CONVNEXT.fullmatch(name) else None

    def without_pooled_head(self) -> ExportableNetwork:
        """Returns the encoder of a custom network with a `PooledClassifier` around it; others as they are."""
        if self.is_custom and isinstance(self.module, PooledClassifier):
            return replace(self, module=self.module.encoder, classes=None)
        return self

    def backbone_tensors(self) -> dict[str, Tensor]:
        """Returns the encoder's tensors up to its last feature map, under its own names."""
        return self.weights.backbone_tensors(encoder_of(self.module))

    def timm_tensors(self) -> tuple[str, dict[str, Tensor]]:
        """Returns timm's name of the network, and its tensors under timm's names, which load strictly there.

        For an encoder, that is into `timm.create_model(name, num_classes=0)`. A custom network has its factory's name,
        under which it can be registered in timm, and keeps its tensors' names.
        """
        import timm

        if self.is_custom:
            return self.factory, tensors_of(self.module)
        base = self.name.removeprefix("torchvision/")
        if base == self.name and (not base or not timm.is_model(base)):
            raise UserError(
                f"{self.label} is not known to be a network of timm; give its name there as model, or export it as "
                "onnx or torch-export, which take any network"
            )
        if base != self.name and base not in IN_BOTH_LIBRARIES:
            raise UserError(
                f"timm has no network equivalent to {self.name}; export it as torchvision, onnx or torch-export"
            )
        with torch.device("meta"):
            target = timm.create_model(base, num_classes=len(self.classes or ()), in_chans=self.weights.channels)
        tensors = tensors_of(self.module)
        if base != self.name:
            wanted = target.state_dict().items()
            tensors = {name: tensors[torchvision_name(name)].reshape(tensor.shape) for name, tensor in wanted}
        check_fit(target, tensors, f"timm's {base}")
        return base, tensors


def open_exportable(path: str | Path, model: str | nn.Module | None = None) -> ExportableNetwork:
    """Opens weights as `open_weights` does, and builds their network; a module given as `model` is copied."""
    weights, model = open_weights(path), own_module(model)
    classes = weights.classes if weights.kind == "classifier" else None
    module = weights.encoder(model) if classes is None else weights.classifier(model)
    name = model if isinstance(model, str) else getattr(model, "default_cfg", {}).get("architecture")
    name = name or weights.metadata.model or ""
    if ".py:" not in name:
        name = name.partition(".")[0]  # resnet50.a1_in1k: the tag names weights
    return ExportableNetwork(weights, name, module, classes)


def check_fit(target: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Checks that names and shapes of tensors are exactly those of a network, which a message calls `what`."""
    own = {name: tensor.shape for name, tensor in target.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    different = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if different:
        raise UserError(
            f"the weights do not fit {what}: {len(different)} names or shapes differ, the first is {different[0]}; "
            "give the network's own name as model"
        )
