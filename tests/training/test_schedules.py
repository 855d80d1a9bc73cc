"""The schedules of the paper, against the original implementation's numbers."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmim.training.schedules import learning_rate, weight_decay

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
