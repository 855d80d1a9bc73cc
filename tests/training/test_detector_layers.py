"""Layer decay in detection: the recipes' tables for ResNet-50 and ConvNeXt-B, and the rule for the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparkmim.models import create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.training.layer_decay import detector_layer_decay_exponents

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "layer_decay.json").read_text())

RESNET50 = {
    "": 7,
    "layer1.0": 6, "layer1.1": 6, "layer1.2": 6,
    "layer2.0": 5, "layer2.1": 5, "layer2.2": 4, "layer2.3": 4,
    "layer3.0": 3, "layer3.1": 3, "layer3.2": 3, "layer3.3": 2, "layer3.4": 2, "layer3.5": 2,
    "layer4.0": 1, "layer4.1": 1, "layer4.2": 1,
}  # fmt: skip
"""Exponent of each block; the stem has no block."""

CONVNEXT_B = {
    "": 13,
    "stages.0.blocks.0": 12, "stages.0.blocks.1": 12, "stages.0.blocks.2": 12,
    "stages.1.downsample": 11, "stages.1.blocks.0": 11, "stages.1.blocks.1": 11, "stages.1.blocks.2": 11,
    "stages.2.downsample": 10, **{f"stages.2.blocks.{block}": 10 - block // 3 for block in range(27)},
    "stages.3.downsample": 1, "stages.3.blocks.0": 1, "stages.3.blocks.1": 1, "stages.3.blocks.2": 1,
}  # fmt: skip
"""12 groups, and the stem below them (facebookresearch/ConvNeXt, `layer_decay_optimizer_constructor.py`)."""


def detector(name: str) -> nn.Module:
    with torch.device("meta"):  # names are enough
        return create_detector(create_encoder(name), 80)


def block_of(name: str) -> str:
    match = re.match(r"layer\d\.\d+|stages\.\d\.(blocks\.\d+|downsample)", name)
    return match[0] if match else ""


@pytest.mark.parametrize(("name", "table"), [("resnet50", RESNET50), ("convnext_base", CONVNEXT_B)])
def test_tables(name: str, table: dict[str, int]) -> None:
    model: Any = detector(name)
    exponents = detector_layer_decay_exponents(model)
    assert list(exponents) == [name for name, _ in model.named_parameters()]
    unreached = set(model.backbone.hierarchy.unreached)
    blocks: dict[str, set[int]] = {}
    for parameter, exponent in exponents.items():
        inner = parameter.removeprefix("backbone.encoder.")
        if inner == parameter or inner in unreached:
            assert exponent == 0, parameter
        else:
            blocks.setdefault(block_of(inner), set()).add(exponent)
    assert blocks == {block: {exponent} for block, exponent in table.items()}


def test_resnet50_is_as_in_classification() -> None:
    exponents = detector_layer_decay_exponents(detector("resnet50"))
    inner = {name: exponents[f"backbone.encoder.{name}"] for name in GOLDEN["resnet50"] if not name.startswith("fc.")}
    assert inner == {name: exponent for name, exponent in GOLDEN["resnet50"].items() if not name.startswith("fc.")}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "torchvision/mobilenet_v3_small"])
def test_rule_for_the_rest(name: str) -> None:
    """Every parameter once; the deepest layers once below the new parts, the stem at the lowest rate."""
    model: Any = detector(name)
    exponents = detector_layer_decay_exponents(model)
    assert list(exponents) == [name for name, _ in model.named_parameters()]
    unreached = {f"backbone.encoder.{name}" for name in model.backbone.hierarchy.unreached}
    inside = {n: e for n, e in exponents.items() if n.startswith("backbone.encoder.") and n not in unreached}
    assert min(inside.values()) == 1
    assert next(iter(inside.values())) == max(inside.values()) <= 13
    assert {exponent for name, exponent in exponents.items() if name not in inside} == {0}


def test_a_model_without_pyramid_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no PyramidBackbone"):
        detector_layer_decay_exponents(nn.Linear(1, 1))
