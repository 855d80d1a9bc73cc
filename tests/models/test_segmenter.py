"""The segmentation head on any encoder: sizes, gradients, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_networks import PlainCNN
from torch import nn
from torch.nn import functional as F

from sparkmim.models import create_encoder
from sparkmim.models.segmenter import create_segmenter
from sparkmim.training.layer_decay import detector_layer_decay_exponents

SMALL_CNN = f"{Path(__file__).parents[2] / 'examples' / 'small_cnn.py'}:small_cnn"


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", SMALL_CNN])
def test_a_class_for_each_pixel_and_a_gradient_for_each_parameter(name: str) -> None:
    model = create_segmenter(create_encoder(name), 5)
    logits = model(torch.rand(2, 3, 70, 101))
    assert logits.shape == (2, 5, 70, 101)
    logits.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    exponents = detector_layer_decay_exponents(model)
    assert list(exponents) == [name for name, _ in model.named_parameters()]
    assert {exponent for name, exponent in exponents.items() if not name.startswith("backbone.encoder.")} == {0}


def test_strides_that_do_not_double() -> None:
    """Levels at strides 5 and 30."""
    layers = [nn.Conv2d(3, 8, 5, 5), nn.ReLU(), nn.Conv2d(8, 8, 6, 6), nn.ReLU()]
    model = create_segmenter(nn.Sequential(*layers), 2, image_size=(240, 240), feature_modules=["1", "3"])
    assert model.backbone.strides == (5, 30)
    assert model(torch.rand(1, 3, 64, 33)).shape == (1, 2, 64, 33)


def test_it_learns_where_the_bright_half_is() -> None:
    torch.manual_seed(0)
    model = create_segmenter(PlainCNN(1), 2, channels=1, norm="batch")
    labels = torch.zeros(2, 48, 48, dtype=torch.int64)
    labels[0, :, 24:] = labels[1, :16] = 1
    images = labels[:, None].float() + 0.1 * torch.randn(2, 1, 48, 48)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


def test_all_of_it_computes_in_low_precision() -> None:
    model = create_segmenter(create_encoder("resnet18"), 2)
    kinds = {}
    for name in ("backbone.encoder.layer1.0.conv1", "backbone.pyramid.layer_blocks.0.0"):
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: kinds.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(1, 3, 64, 64)).dtype == torch.float32  # resized in full
    assert set(kinds.values()) == {torch.bfloat16}
    assert len(kinds) == 2


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="classes is 1; segmentation needs 2 or more"):
        create_segmenter(create_encoder("resnet18"), 1)
