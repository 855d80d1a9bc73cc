"""Exponents of layer-wise learning-rate decay: the original's, and a sound rule for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

from sparkmim.interop.official import encoder_name
from sparkmim.models import create_classifier
from sparkmim.training.layer_decay import layer_decay_exponents

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "layer_decay.json").read_text())
CONVNEXT_HEAD = {
    "norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias", "head.weight": "head.fc.weight",
    "head.bias": "head.fc.bias",
}  # fmt: skip


def test_golden_resnet50() -> None:
    assert layer_decay_exponents(timm.create_model("resnet50")) == GOLDEN["resnet50"]


def test_golden_convnext_small() -> None:
    expected = {CONVNEXT_HEAD.get(name, encoder_name(name)): e for name, e in GOLDEN["convnext_small"].items()}
    assert layer_decay_exponents(timm.create_model("convnext_small")) == expected


def test_resnets_of_timm_and_torchvision_alike() -> None:
    ours = layer_decay_exponents(create_classifier("torchvision/resnet50", 10))
    assert ours == layer_decay_exponents(timm.create_model("resnet50"))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet101", "seresnet50", "convnext_atto", "efficientnet_b0", "densenet121", "dla34",
     "torchvision/convnext_tiny", "torchvision/vgg11", "torchvision/mobilenet_v3_small"],
)  # fmt: skip
def test_rule_by_depth(name: str) -> None:
    """Every parameter once; the head at the full rate, the stem at the lowest; no group skipped, 13 at most."""
    model = create_classifier(name, 10)
    exponents = layer_decay_exponents(model)
    names = [name for name, _ in model.named_parameters()]
    assert list(exponents) == names
    assert exponents[names[-1]] == 0  # the classifier's bias
    assert exponents[names[0]] == max(exponents.values()) <= 13
    assert min(exponents.values()) == 0


def test_of_a_network_of_ones_own(network: str) -> None:
    """The linear head of a pooled classifier, and what no map reaches, at the full rate."""
    exponents = layer_decay_exponents(create_classifier(network, 3))
    assert exponents["head.weight"] == exponents["head.bias"] == exponents["encoder.fc.weight"] == 0
    assert exponents["encoder.stem.0.weight"] > exponents["encoder.body.0.weight"] > 0
