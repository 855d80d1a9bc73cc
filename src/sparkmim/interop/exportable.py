"""A network to export: its module with the weights in it, and its tensors under timm's names."""

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
"""Networks that timm and torchvision have under one name, and compute alike."""

_PLAIN_RESNETS = {name for name in IN_BOTH_LIBRARIES if not name.startswith("convnext")} | {"resnet200"}
_PLAIN_CONVNEXT = re.compile(r"convnext(v2)?_(atto|femto|pico|nano|tiny|small|base|large|xlarge|huge)")


@dataclass(frozen=True)
class ExportableNetwork:
    """A network with its weights.

    Attributes:
        weights: what was opened.
        name: timm's name without a tag, `torchvision/NAME`, `file.py:factory`, or "" if it is not known.
        module: in evaluation mode: a classifier if the weights are of one, an encoder otherwise.
        classes: their names; None of an encoder.
    """

    weights: Weights
    name: str
    module: nn.Module
    classes: list[str] | None

    @property
    def is_own(self) -> bool:
        """Whether its user wrote it, so that other software can only know it by the names that it has itself."""
        return ".py:" in self.name

    def own_backbone(self) -> dict[str, Tensor]:
        """The tensors of the user's network, under its own names, without what stands behind the last feature map."""
        return self.weights.without_unreached(encoder_of(self.module))

    def own_alone(self) -> ExportableNetwork:
        """Without a classifier that was put behind the user's network."""
        if self.is_own and isinstance(self.module, PooledClassifier):
            return replace(self, module=self.module.encoder, classes=None)
        return self

    @property
    def factory(self) -> str:
        """The function that makes the user's network."""
        return self.name.rpartition(":")[2]

    def called(self) -> str:
        """How messages call it."""
        return self.name or type(self.module).__name__

    def in_timm(self) -> tuple[str, dict[str, Tensor]]:
        """timm's name of the network, and its tensors under timm's names, which load strictly there.

        Of an encoder without a classifier: `timm.create_model(name, num_classes=0)`. Of the user's own network, the
        factory, which timm knows if it is registered there, and the network's own names.

        Raises:
            ValueError: if timm has no such network.
        """
        import timm

        if self.is_own:
            return self.factory, tensors_of(self.module)
        base = self.name.removeprefix("torchvision/")
        if base == self.name and (not base or not timm.is_model(base)):
            raise UserError(
                f"{self.called()} is not known to be a network of timm; give its name there as model, or export it as "
                "onnx or torch-export, which take any network"
            )
        if base != self.name and base not in IN_BOTH_LIBRARIES:
            raise UserError(
                f"timm computes no network as {self.name} does; export it as torchvision, onnx or torch-export"
            )
        with torch.device("meta"):
            target = timm.create_model(base, num_classes=len(self.classes or ()), in_chans=self.weights.channels)
        tensors = tensors_of(self.module)
        if base != self.name:
            given = tensors
            tensors = {
                name: given[torchvision_name(name)].reshape(tensor.shape)
                for name, tensor in target.state_dict().items()
            }
        check_fit(target, tensors, f"timm's {base}")
        return base, tensors

    def family(self) -> Family | None:
        """Whether it is an ordinary ResNet (ResNeXt, wide ResNet) or ConvNeXt (V2); None for all else."""
        name = self.name.removeprefix("torchvision/")
        if name in _PLAIN_RESNETS:
            return "resnet"
        return "convnext" if _PLAIN_CONVNEXT.fullmatch(name) else None


def open_exportable(path: str | Path, model: str | nn.Module | None = None) -> ExportableNetwork:
    """Opens weights and builds their network.

    Args:
        path: run folder, one of our weight files, or an original SparK file.
        model: the network's name, or a module to load into; None for what the file says.

    Raises:
        ValueError: if there are no weights, they do not fit, or no name is known.
    """
    weights, model = open_weights(path), own_module(model)
    module = weights.classifier(model) if weights.kind == "classifier" else weights.encoder(model)
    name = model if isinstance(model, str) else getattr(model, "default_cfg", {}).get("architecture")
    name = str(name or weights.metadata.get("model") or "")
    if ".py:" not in name:
        name = name.partition(".")[0]  # resnet50.a1_in1k: the tag names weights
    return ExportableNetwork(weights, name, module, weights.classes if weights.kind == "classifier" else None)


def check_fit(target: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises a ValueError unless the tensors are, by name and shape, all that the target has."""
    own = {name: tensor.shape for name, tensor in target.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    different = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if different:
        raise UserError(
            f"the weights do not fit {what}: {len(different)} names or shapes differ, the first is {different[0]}; "
            "give the network's own name as model"
        )
