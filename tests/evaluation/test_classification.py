"""Scores of classifiers against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparkmim.errors import UnusableData
from sparkmim.evaluation.classification import score_classifier
from sparkmim.evaluation.scores import known_figures

NAMES = ["a", "b", "c"]


def batch(logits: torch.Tensor, labels: list[int], skipped: list[int]) -> dict[str, Any]:
    return {"image": logits, "label": torch.tensor(labels), "skipped": torch.tensor(skipped)}


def test_figures_are_those_of_the_definition() -> None:
    """With images of two classes of three, and a skipped one."""
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 1, 1, 0, 1, 0, 1, 1, 1]
    batches = [batch(logits[:4], labels[:4], [0] * 4), batch(logits[4:], labels[4:], [0] * 4 + [1])]
    model = torch.nn.Identity().train()
    scores = score_classifier(model, batches, NAMES, torch.device("cpu"))
    assert model.training
    real, truth = logits[:8], torch.tensor(labels[:8])
    right = real.argmax(1) == truth
    assert scores.main == scores.top1 == pytest.approx(right.float().mean().item())
    assert scores.top5 == 1.0
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(real, truth).item(), rel=1e-6)
    assert scores.per_class["b"] == pytest.approx(right[truth == 1].float().mean().item())
    assert math.isnan(scores.per_class["c"])
    assert sum(map(sum, scores.confusion)) == 8
    assert known_figures(scores) == {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss}
    written = scores.as_json()
    assert list(written) == ["top1", "top5", "per_class", "confusion", "loss"]
    assert list(written["per_class"]) == ["a", "b"]
    assert scores.table().row_count == 1


def test_nothing_to_score() -> None:
    with pytest.raises(UnusableData, match="none of the validation images could be read"):
        score_classifier(torch.nn.Identity(), [batch(torch.zeros(1, 3), [0], [1])], NAMES, torch.device("cpu"))
