"""The last layer, fitted to frozen features before fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.evaluation.linear import Standardiser, fit_logistic
from sparkmim.training.head import fit_head, linear_head


class Net(nn.Module):
    """Two channels of features, a norm with running statistics, and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def batches(skipped: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(30) % 3
    images[:, 0] += labels[:, None, None]
    marks = torch.zeros(30, dtype=torch.long)
    marks[:skipped] = 1
    return [
        {"image": images[i : i + 8], "label": labels[i : i + 8], "skipped": marks[i : i + 8], "unreadable": []}
        for i in range(0, 30, 8)
    ]


@pytest.mark.parametrize("skipped", [0, 9])
def test_the_head_is_the_logistic_regression_of_frozen_features(skipped: int) -> None:
    torch.manual_seed(0)
    model = Net().double()
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head")}
    fit_head(model, batches(skipped), torch.device("cpu"))
    assert model.training
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name]), name
    model.eval()
    images = torch.cat([batch["image"] for batch in batches()])[skipped:]
    labels = torch.cat([batch["label"] for batch in batches()])[skipped:]
    with torch.no_grad():
        features = model.body(images).mean((2, 3)).float()
        standard = Standardiser.of(features)
        weight, bias = fit_logistic(standard(features), labels, 3, 1 / len(labels))
        expected = standard(features) @ weight.t() + bias
        torch.testing.assert_close(model(images).float(), expected, rtol=1e-5, atol=1e-6)


def test_the_head_must_be_one_linear_layer() -> None:
    model = Net()
    assert linear_head(model) is model.head
    two: Any = Net()
    two.other = nn.Linear(8, 3)
    two.default_cfg = {"classifier": ("head", "other")}
    with pytest.raises(UserError, match="one linear layer"):
        linear_head(two)
