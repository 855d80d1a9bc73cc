"""Intersection over union against its definition, and the choice of classes at another size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.nn import functional as F

from sparkmim.data.label_maps import IGNORED
from sparkmim.evaluation import SegmentationScores, classes_at, evaluate_segmentation


def label_maps(classes: int) -> st.SearchStrategy[list[tuple[list[int], list[int]]]]:
    pixel = st.tuples(st.integers(0, classes - 1), st.integers(IGNORED, classes - 1))
    return st.lists(st.lists(pixel, min_size=1, max_size=12), min_size=1, max_size=4).map(
        lambda maps: [tuple(map(list, zip(*pixels, strict=True))) for pixels in maps]  # type: ignore[misc]
    )


@settings(deadline=None)
@given(st.integers(2, 5).flatmap(lambda classes: st.tuples(st.just(classes), label_maps(classes))))
def test_figures_are_those_of_the_definition(case: tuple[int, list[tuple[list[int], list[int]]]]) -> None:
    classes, maps = case
    names = [f"class {number}" for number in range(classes)]
    given_maps = [(torch.tensor([found]), torch.tensor([truth])) for found, truth in maps]
    found = np.concatenate([found for found, _ in maps])
    truth = np.concatenate([truth for _, truth in maps])
    found, truth = found[truth != IGNORED], truth[truth != IGNORED]
    if not len(truth):
        with pytest.raises(RuntimeError, match="all of their pixels count for nothing"):
            evaluate_segmentation(given_maps, names)
        return
    expected = []
    for number in range(classes):
        union = ((found == number) | (truth == number)).sum()
        expected.append(((found == number) & (truth == number)).sum() / union if union else math.nan)
    scores = evaluate_segmentation(given_maps, names)
    assert list(scores.per_class) == names
    assert np.allclose(list(scores.per_class.values()), expected, equal_nan=True, rtol=1e-12)
    assert scores.figures["mIoU"] == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert scores.figures["pixel_accuracy"] == pytest.approx((found == truth).mean(), rel=1e-12)
    assert scores.main == scores.figures["mIoU"]


def test_the_truth_is_perfect() -> None:
    truth = torch.arange(60).view(6, 10) % 4 - 1
    scores = evaluate_segmentation([(truth.clamp(min=0), truth)], ["a", "b", "c", "nowhere"])
    assert scores.figures == {"mIoU": 1.0, "pixel_accuracy": 1.0}
    assert scores.as_json()["per_class"] == {"a": 1.0, "b": 1.0, "c": 1.0, "nowhere": None}
    console = Console(width=60)
    with console.capture() as said:
        console.print(scores.table())
    assert said.get().split() == ["class", "IoU", "a", "100.0", "b", "100.0", "c", "100.0", "nowhere", "–", "mean",
                                  "100.0", "pixel", "accuracy", "100.0"]  # fmt: skip


def test_many_classes_stand_in_columns() -> None:
    shares = {f"c{number}": number / 1000 for number in range(100)}
    console = Console(width=60)
    with console.capture() as said:
        console.print(SegmentationScores({"mIoU": 0.0495, "pixel_accuracy": 0.5}, shares).table())
    lines = [line.split() for line in said.get().splitlines()]
    assert len(lines) == 1 + 34 + 2
    assert lines[1] == ["c0", "0.0", "c34", "3.4", "c68", "6.8"]
    assert lines[32] == ["c31", "3.1", "c65", "6.5", "c99", "9.9"]
    assert lines[34:] == [["c33", "3.3", "c67", "6.7"], ["mean", "5.0"], ["pixel", "accuracy", "50.0"]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(0, 1000))
def test_classes_at_another_size(classes: int, height: int, width: int, larger: int, seed: int) -> None:
    logits = torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed))
    size = (larger, 13)
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(classes_at(logits, size), expected)
    assert torch.equal(classes_at(logits, (height, width)), logits.argmax(0))
