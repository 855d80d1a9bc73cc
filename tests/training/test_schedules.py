"""The schedules of the paper: against the original implementation's numbers, and detection's."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmim.training.recipes import DETECT_RECIPES
from sparkmim.training.schedules import learning_rate, stepped_learning_rate, weight_decay

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "spark_reference.json").read_text())
TRAINING = next(case["training"] for case in GOLDEN if "training" in case)


@pytest.mark.parametrize("step", range(TRAINING["steps"]))
def test_schedules_are_the_original_ones(step: int) -> None:
    steps, (start, end) = TRAINING["steps"], TRAINING["weight_decay"]
    rate, decay = TRAINING["lr_wd"][step]
    assert learning_rate(step, steps, TRAINING["warmup_steps"], TRAINING["peak_lr"]) == pytest.approx(rate, rel=1e-12)
    assert weight_decay(step, steps, start, end) == pytest.approx(decay, rel=1e-12)


@given(steps=st.integers(1, 500), share=st.floats(0, 0.99), peak=st.floats(1e-6, 1.0))
def test_the_rate_never_leaves_its_bounds(steps: int, share: float, peak: float) -> None:
    warmup = int(share * steps)
    rates = [learning_rate(step, steps, warmup, peak) for step in range(steps)]
    assert max(rates) <= peak * (1 + 1e-12)
    assert min(rates) >= 0.001 * peak * (1 - 1e-12)
    assert rates[warmup] == pytest.approx(peak)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("name", "steps", "shares"),
    [
        (
            "resnet50_1x", 90_000,
            {0: 0.01, 500: 0.505, 1000: 1, 59_999: 1, 60_000: 0.25, 79_999: 0.25, 80_000: 0.0625, 89_999: 0.0625},
        ),
        (
            "convnext_base_3x", 36 * 7330,
            {0: 0.001, 500: 1, 27 * 7330 - 1: 1, 27 * 7330: 0.2, 33 * 7330 - 1: 0.2, 33 * 7330: 0.04},
        ),
    ],
)  # fmt: skip
def test_detection_steps_where_the_recipes_do(name: str, steps: int, shares: dict[int, float]) -> None:
    recipe = DETECT_RECIPES[name]
    peak = recipe.learning_rate
    for step, share in shares.items():
        rate = stepped_learning_rate(
            step, steps, recipe.warmup_iterations, peak, recipe.warmup_start, recipe.drops, recipe.drop_factor
        )
        assert rate == pytest.approx(share * peak, rel=1e-12), step


def test_no_warmup_starts_at_the_peak() -> None:
    assert stepped_learning_rate(0, 10, 0, 3.0, 0.01, (0.5,), 0.1) == 3.0
